import pytest

from clear_dist.families.flux.card import FluxShape
from tests.tiny import make_tiny_pipeline


@pytest.mark.parametrize("guidance", [True, False])
def test_every_tensor_of_the_transformer_is_known(guidance: bool) -> None:
    transformer = make_tiny_pipeline(double_blocks=2, single_blocks=3, guidance_embeds=guidance).transformer
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert FluxShape.of(transformer.config, "here").tensors() == expected
