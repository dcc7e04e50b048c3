// The search runs in a worker, which browsers do not start from files. Opened from the disk, a
// hidden frame with the worker's script takes its place and exchanges the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      const setUp = `self.postMessage = (data) => parent.postMessage(data, "*");`;
      frame.srcdoc = `<base href="${document.baseURI}"><script>${setUp}</script>
        <script src="${new URL(url, document.baseURI)}"></script>`;
      this.ready = new Promise((done) => frame.addEventListener("load", done, { once: true }));
      window.addEventListener("message", (event) => {
        if (event.source !== frame.contentWindow) return;
        const copy = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      });
      document.body.append(frame);
      this.frame = frame;
    }

    postMessage(data) {
      // An event, since the worker's script replies by the frame's own postMessage.
      const event = new MessageEvent("message", { data });
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(event));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
