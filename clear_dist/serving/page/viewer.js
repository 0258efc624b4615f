"use strict";

/** A picture that is looked into: tiles of a pyramid on a canvas, moved by dragging, enlarged by scrolling. */
class Viewer {
  static side = 512;

  constructor(canvas) {
    this.canvas = canvas;
    this.tiles = new Map();
    this.picture = null; // {url, width, height}, or {image, width, height} for a preview
    new ResizeObserver(() => this.fit()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => event.buttons && this.move(event.movementX, event.movementY));
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  show(picture) {
    const isSame = this.picture && this.picture.width === picture.width && this.picture.height === picture.height;
    this.picture = picture;
    this.tiles.clear();
    if (isSame) this.draw();
    else this.fit();
  }

  fit() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, this.canvas.clientWidth * ratio);
    this.canvas.height = Math.max(1, this.canvas.clientHeight * ratio);
    if (!this.picture) return;
    this.scale = Math.min(this.canvas.width / this.picture.width, this.canvas.height / this.picture.height);
    this.left = (this.canvas.width - this.scale * this.picture.width) / 2;
    this.top = (this.canvas.height - this.scale * this.picture.height) / 2;
    this.draw();
  }

  move(x, y) {
    const ratio = window.devicePixelRatio || 1;
    this.left += x * ratio;
    this.top += y * ratio;
    this.draw();
  }

  zoom(factor, x, y) {
    const scale = Math.min(16, Math.max(0.01, this.scale * factor));
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.draw();
  }

  onWheel(event) {
    event.preventDefault();
    const ratio = window.devicePixelRatio || 1;
    if (this.picture) this.zoom(Math.exp(-event.deltaY / 300), event.offsetX * ratio, event.offsetY * ratio);
  }

  onKey(event) {
    const steps = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    if (!this.picture) return;
    if (steps[event.key]) this.move(...steps[event.key]);
    if (event.key === "+" || event.key === "-") {
      this.zoom(event.key === "+" ? 1.25 : 0.8, this.canvas.width / 2, this.canvas.height / 2);
    }
  }

  /** The level whose pixels are nearest to the screen's, and not larger. */
  get level() {
    let last = 0;
    while (Math.max(this.picture.width, this.picture.height) / 2 ** last > Viewer.side) last += 1;
    return Math.min(last, Math.max(0, Math.floor(Math.log2(1 / this.scale))));
  }

  draw() {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.picture) return;
    context.setTransform(this.scale, 0, 0, this.scale, this.left, this.top);
    context.imageSmoothingEnabled = this.scale < 3;
    if (this.picture.image) {
      context.drawImage(this.picture.image, 0, 0, this.picture.width, this.picture.height);
      return;
    }
    const level = this.level, step = Viewer.side * 2 ** level;
    for (let row = 0; row * step < this.picture.height; row += 1) {
      for (let column = 0; column * step < this.picture.width; column += 1) {
        if (this.isSeen(column * step, row * step, step)) this.drawTile(context, level, column, row, step);
      }
    }
  }

  isSeen(x, y, step) {
    const left = this.left + x * this.scale, top = this.top + y * this.scale, side = step * this.scale;
    return left < this.canvas.width && top < this.canvas.height && left + side > 0 && top + side > 0;
  }

  drawTile(context, level, column, row, step) {
    const url = `${this.picture.url}/tiles/${level}/${column}/${row}`;
    if (!this.tiles.has(url)) {
      const tile = new Image();
      tile.onload = () => this.draw();
      tile.src = url;
      this.tiles.set(url, tile);
    }
    const tile = this.tiles.get(url), factor = 2 ** level;
    if (tile.complete && tile.naturalWidth) {
      context.drawImage(tile, column * step, row * step, tile.naturalWidth * factor, tile.naturalHeight * factor);
    }
  }
}
