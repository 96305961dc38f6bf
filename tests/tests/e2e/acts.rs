//! What a person does on the page, with a token, and what becomes of it.

use anello_tests::{Browser, newest_checkpoint, wait_until};
use serde_json::json;

use super::http::{OPERATOR, Serving, make_tokens};
use super::world;

/// Presses a button, and the one of the question whether that is meant.
fn confirm(browser: &mut Browser, action: &str) {
    browser.click(action);
    browser.wait_for("document.getElementById('ask').open");
    browser.click(action);
    browser.wait_for("!document.getElementById('ask').open");
}

#[test]
fn a_person_with_a_token_acts_on_the_page() {
    make_tokens("acts-tokens");
    let serving = Serving::coordinator("acts", "1", &["--token", "acts-tokens"]);
    // A long one, whose only checkpoint for a long time is that at the end of its first stage.
    let submit = ["submit", "small.toml", "--name", "a", "--set", "stage.stable.tokens=3000000"];
    serving.ask(&[&submit[..], &["--set", "checkpoint.every_steps=1000000"]].concat());
    let url = format!("http://127.0.0.1:{}/#/jobs/a", serving.port);
    let Some(mut browser) = Browser::open(&world().folder, &url) else { return };

    const ASKED: &str = "document.getElementById('ask').open && document.getElementById('ask-title').textContent === \
                         'Who are you?'";
    let kept = |token: &str| format!("sessionStorage.getItem('anello-token') === {}", json!(token));
    browser.wait_for(ASKED);
    assert_eq!(browser.value("document.getElementById('ask-input').type"), "password");
    assert_eq!(browser.value("document.activeElement.id"), "ask-input", "who types needs no mouse");
    browser.write("operator-0123456789abcdeX");
    browser.enter();
    // It is nobody's, so it is asked for again, and nothing is shown.
    browser.wait_for(&format!("{} && {ASKED}", kept("operator-0123456789abcdeX")));
    assert_eq!(browser.value("document.querySelector('h1')"), json!(null));
    browser.write(OPERATOR);
    browser.click("Go on");
    browser.wait_for("document.querySelector('h1').textContent === 'a'");
    assert_eq!(browser.value(&kept(OPERATOR)), true);
    let page = browser.value("document.documentElement.outerHTML + location.href");
    assert!(!page.as_str().unwrap_or_default().contains(OPERATOR), "a token stays in the tab's own memory");

    let folder = world().folder.join("acts/a");
    wait_until("it is in its long stage", || newest_checkpoint(&folder) > 0);
    let before = newest_checkpoint(&folder);
    browser.click("Checkpoint now");
    browser.wait_for("document.getElementById('ask').open");
    // Not this time.
    browser.click("Back");
    browser.wait_for("!document.getElementById('ask').open");
    assert!(!serving.process.log().contains("action=\"checkpoint\""));
    confirm(&mut browser, "Checkpoint now");
    wait_until("there is another checkpoint", || newest_checkpoint(&folder) > before);

    confirm(&mut browser, "Pause");
    wait_until("it is paused", || serving.process.out().contains("job a is paused\n"));
    browser.click("Resume");
    browser.wait_for("document.getElementById('ask').open");
    browser.click("Back");
    let log = serving.process.log();
    for action in ["checkpoint", "pause"] {
        let line = format!("action=\"{action}\" job=\"a\" outcome=200");
        assert!(log.contains(&line) && log.contains("who=\"ann\""), "{line}\n{log}");
    }
    assert!(!log.contains(OPERATOR) && !log.contains("action=\"resume\""), "{log}");
}
