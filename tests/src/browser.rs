//! A headless Chromium that does what a person does: looks, clicks and types. It is spoken with over its debugging pipe (the
//! DevTools protocol: JSON, each message with a zero byte after it).

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use crate::tool::{CHROMIUM, find};
use crate::wait_until;

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    profile: PathBuf,
    session: Option<String>,
    sent: u64,
}

impl Browser {
    /// Opens `url`; its profile is in `folder`. `None` where there is no Chromium.
    ///
    /// # Panics
    /// In CI, when there is none.
    pub fn open(folder: &Path, url: &str) -> Option<Self> {
        let program = find("chromium", "install Debian's chromium")?;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let profile = folder.join(format!("browser-{}-{number}", std::process::id()));
        let mut child = Command::new("sh")
            // It reads what it is asked from descriptor 3, and answers on descriptor 4.
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>&2 2>/dev/null"#])
            .arg(program)
            .args(CHROMIUM)
            .args(["--remote-debugging-pipe", "--window-size=1280,1000"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Chromium starts");
        let input = child.stdin.take().expect("it is piped");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut browser = Self { child, input, output, profile, session: None, sent: 0 };
        let page = browser.call("Target.createTarget", json!({ "url": url }));
        let to = json!({ "targetId": page["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", to);
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        Some(browser)
    }

    /// Asks the browser for something, and waits for the answer.
    fn call(&mut self, method: &str, params: Value) -> Value {
        self.sent += 1;
        let mut message = json!({ "id": self.sent, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.input.write_all(&bytes).expect("the browser lives");
        loop {
            let mut bytes = Vec::new();
            self.output.read_until(0, &mut bytes).expect("the browser lives");
            assert!(bytes.pop() == Some(0), "the browser has ended");
            let answer: Value = serde_json::from_slice(&bytes).expect("it speaks JSON");
            if answer["id"] == json!(self.sent) {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// The value of an expression in the page; null when it throws, as while the page is being loaded.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        self.call("Runtime.evaluate", asked)["result"]["value"].clone()
    }

    /// Waits until an expression in the page is true.
    ///
    /// # Panics
    /// When it does not become true in time; the page is shown.
    pub fn wait_for(&mut self, expression: &str) {
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(expression, || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                self.value(expression) == json!(true)
            });
        }));
        if seen.is_err() {
            let page = self.value("document.body.innerText");
            panic!(
                "{expression} does not become true; the page shows:\n{}",
                page.as_str().unwrap_or_default()
            );
        }
    }

    /// Clicks in the middle of the button that has this text, by the mouse: in a dialog, where one is open.
    pub fn click(&mut self, text: &str) {
        let button = format!(
            "[...(document.querySelector('dialog[open]') || document).querySelectorAll('button')].find(b => b.textContent === \
             {} && b.checkVisibility())",
            json!(text)
        );
        self.wait_for(&format!("!!({button})"));
        let place = format!(
            "(b => {{ b.scrollIntoView({{ block: 'center', behavior: 'instant' }}); const r = b.getBoundingClientRect(); return [r.x + \
             r.width / 2, r.y + r.height / 2]; }})({button})"
        );
        let place = self.value(&place);
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            let mut event = json!({ "type": kind, "x": place[0], "y": place[1] });
            if kind != "mouseMoved" {
                (event["button"], event["clickCount"]) = (json!("left"), json!(1));
            }
            self.call("Input.dispatchMouseEvent", event);
        }
    }

    /// Types where the focus is.
    pub fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text }));
    }

    /// Presses Return.
    pub fn enter(&mut self) {
        self.press("Enter", 13, Some("\r"));
    }

    /// Presses Tab, which takes the focus further.
    pub fn tab(&mut self) {
        self.press("Tab", 9, None);
    }

    fn press(&mut self, key: &str, code: u32, text: Option<&str>) {
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if let (Some(text), "keyDown") = (text, kind) {
                event["text"] = json!(text);
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// As one whose system is dark, or light, sees it from now on.
    pub fn look(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// In a window of so many pixels from now on.
    pub fn size(&mut self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}
