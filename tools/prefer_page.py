"""The local web page on which a person chooses between two images: http.server on 127.0.0.1, for one person at a time.

    GET /                       the page
    GET /state[?pair=7]         JSON: the next pair that is not decided (or pair 7), what it was asked for, how many are done
    GET /image?pair=7&side=0    PNG
    POST /vote                  JSON {"pair": 7, "choice": "left" | "right" | "tie" | "skip"}; answers with the next state

Other sites that the browser shows cannot vote: requests must name this host, and votes must be JSON.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from flowjax.config import ConfigError
from flowjax.data import images
from flowjax.data.votes import Session

MOST = 4096  # bytes of a vote

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which is better?</title>
<style>
  body { margin: 0; font: 18px/1.5 system-ui, sans-serif; background: #fafafa; color: #222; text-align: center; }
  main { max-width: 1100px; margin: 0 auto; padding: 24px; }
  h1 { font-size: 26px; margin: 8px 0 20px; min-height: 1.5em; }
  #pair { display: flex; gap: 32px; justify-content: center; }
  figure { margin: 0; width: 44%; max-width: 480px; cursor: pointer; border: 6px solid #ddd; border-radius: 10px; background: #fff; }
  figure:hover { border-color: #999; } figure.chosen, button.chosen { border-color: #1a73e8; }
  img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #888; }
  figcaption { padding: 6px; } kbd { border: 1px solid #bbb; border-bottom-width: 3px; border-radius: 5px; padding: 1px 8px; background: #fff; }
  button { font: inherit; margin: 24px 6px 0; padding: 8px 18px; border: 1px solid #bbb; border-radius: 8px; background: #fff; cursor: pointer; }
  progress { width: 100%; height: 12px; } #error { color: #b00020; min-height: 1.5em; } [hidden] { display: none !important; }
</style></head><body><main>
<progress id="bar" value="0" max="1"></progress><div id="count"></div>
<h1 id="asked"></h1>
<div id="pair">
  <figure id="left"><img id="image0" alt="left image"><figcaption><kbd>&larr;</kbd> left is better</figcaption></figure>
  <figure id="right"><img id="image1" alt="right image"><figcaption>right is better <kbd>&rarr;</kbd></figcaption></figure>
</div>
<div id="buttons"><button id="tie"><kbd>&darr;</kbd> equally good</button><button id="skip"><kbd>S</kbd> skip</button>
<button id="back"><kbd>U</kbd> one back</button></div>
<p id="error"></p>
</main><script>
const $ = id => document.getElementById(id), seen = [];
let state = null, busy = true;
function show(next) {
  state = next; $("error").textContent = "";
  $("bar").max = next.total; $("bar").value = next.done; $("count").textContent = next.done + " of " + next.total + " decided";
  const over = next.pair === null;
  $("pair").hidden = $("tie").hidden = $("skip").hidden = over;
  for (const side of ["left", "right", "tie", "skip"]) $(side).className = next.choice === side ? "chosen" : "";
  if (over) { $("asked").textContent = "All pairs are decided. Thank you; this page can be closed."; busy = false; return; }
  $("asked").textContent = "prompt" in next ? next.prompt : "label" in next ? "class " + next.label : "Which is better?";
  const loaded = [0, 1].map(side => new Promise((done, failed) => {
    const image = $("image" + side); image.onload = done; image.onerror = failed;
    image.src = "/image?pair=" + next.pair + "&side=" + side;
  }));
  Promise.all(loaded).then(() => { busy = false; }, () => failed("an image could not be loaded"));
}
function failed(why) { $("error").textContent = "Not kept: " + why + ". Is the program still running?"; busy = false; }
async function ask(url, options) {
  busy = true;
  try {
    const answer = await fetch(url, options);
    if (!answer.ok) throw new Error(await answer.text());
    show(await answer.json());
    return true;
  } catch (error) { failed(error.message); return false; }
}
async function vote(choice) {
  if (busy || !state || state.pair === null) return;
  const pair = state.pair;
  if (await ask("/vote", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({pair, choice})})) seen.push(pair);
}
function back() { if (!busy && seen.length) ask("/state?pair=" + seen.pop()); }
for (const choice of ["left", "right", "tie", "skip"]) $(choice).onclick = () => vote(choice);
$("back").onclick = back;
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", s: "skip", S: "skip"};
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;  /* a held key decides once */
  if (event.key in keys) { event.preventDefault(); vote(keys[event.key]); }
  if (event.key === "u" || event.key === "U") back();
});
ask("/state");
</script></body></html>
"""


def serve(session: Session, who: str, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1, ready for serve_forever(); port 0 is a free one (server.server_port)."""
    lock = threading.Lock()

    def state(pair: int | None = None) -> dict:
        pending = session.pending(who)
        if pair is None:
            pair = pending[0] if pending else None
        elif not 0 <= pair < len(session):
            raise ConfigError(f"pair {pair} is not in 0..{len(session) - 1}")
        about = {"pair": pair, "done": len(session) - len(pending), "total": len(session)}
        if pair is not None:
            about |= session.asked(pair) | {"choice": session.votes().get((who, pair), {}).get("choice")}
        return about

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, code: int, kind: str, body: bytes):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def answer(self, work):
            """Reply with what work() returns, or with what is wrong, in plain words."""
            if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}:
                return self.reply(403, "text/plain", b"this page is for the machine that it runs on")
            try:
                self.reply(200, *work())
            except ConfigError as error:
                self.reply(400, "text/plain; charset=utf-8", str(error).encode())

        def do_GET(self):
            at = urlsplit(self.path)
            given = {k: v[0] for k, v in parse_qs(at.query).items()}

            def number(name, least, most):
                text = given.get(name, "")
                if not text.isdecimal() or not least <= int(text) <= most:
                    raise ConfigError(f"{name} = {text!r} should be a number in {least}..{most}")
                return int(text)

            def work():
                if at.path == "/":
                    return "text/html; charset=utf-8", PAGE.encode()
                if at.path == "/state":
                    pair = number("pair", 0, len(session) - 1) if "pair" in given else None
                    with lock:
                        return "application/json", json.dumps(state(pair)).encode()
                if at.path == "/image":
                    return "image/png", images.encode_png(session.images[number("pair", 0, len(session) - 1), number("side", 0, 1)])
                raise ConfigError(f"{at.path} is not here; valid: /, /state, /image, /vote")

            self.answer(work)

        def do_POST(self):
            def work():
                length = self.headers.get("Content-Length", "")
                if self.path != "/vote" or self.headers.get_content_type() != "application/json":
                    raise ConfigError("a vote is JSON, posted to /vote")
                if not length.isdecimal() or int(length) > MOST:
                    raise ConfigError(f"a vote has 1 to {MOST} bytes")
                try:
                    told = json.loads(self.rfile.read(int(length)))
                    pair, choice = told["pair"], told["choice"]
                except (ValueError, KeyError, TypeError):
                    raise ConfigError('a vote is {"pair": number, "choice": ...}') from None
                with lock:
                    session.vote(pair, choice, who)
                    return "application/json", json.dumps(state()).encode()

            self.answer(work)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server
