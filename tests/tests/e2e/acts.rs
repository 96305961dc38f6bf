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

/// Texts that are seen, and have less contrast with what is behind them than WCAG 2.2 asks for at level AA (1.4.3): 4.5, or 3 where
/// they are large, by its formula of relative luminance. A line each.
const FAINT: &str = r"(() => {
    const numbers = colour => { const all = colour.match(/[\d.]+/g).map(Number); return all.length < 4 ? [...all, 1] : all; };
    const linear = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            if (colour[3] === 1) return colour;
        }
        return [255, 255, 255, 1];
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const faint = [];
    let seen = 0;
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
        if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const style = getComputedStyle(element);
        const [ink, paper] = [element.closest('svg') ? style.fill : style.color].map(numbers).concat([behind(element)]);
        const [most, least] = [luminance(ink), luminance(paper)].sort((a, b) => b - a);
        const ratio = (most + 0.05) / (least + 0.05);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        seen += 1;
        if (ratio < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 40)} (${element.className.baseVal ?? element.className}): ${ratio.toFixed(2)}`);
    }
    return seen < 10 ? `only ${seen} texts are there` : faint.join('\n');
})()";

/// Light and dark, wide and narrow, and without a mouse.
#[test]
fn a_page_is_for_any_eye_and_any_hand() {
    make_tokens("acts-eyes-tokens");
    let serving = Serving::coordinator("acts-eyes", "1", &["--token", "acts-eyes-tokens"]);
    serving.ask(&["submit", "small.toml", "--name", "a", "--set", "stage.stable.tokens=3000000"]);
    let folder = world().folder.join("acts-eyes/a");
    wait_until("there is something to show", || newest_checkpoint(&folder) >= 9);
    for (route, shows) in [("/", "Jobs"), ("/jobs/a", "a")] {
        let url = format!("http://127.0.0.1:{}/#{route}", serving.port);
        let Some(mut browser) = Browser::open(&world().folder, &url) else { return };
        browser.wait_for("document.getElementById('ask').open");
        browser.write(OPERATOR);
        browser.enter();
        browser.wait_for(&format!("document.querySelector('h1').textContent === '{shows}'"));
        browser.wait_for(&format!(
            "'{route}' === '/' || document.querySelectorAll('figure svg path').length > 5"
        ));
        for scheme in ["light", "dark"] {
            browser.look(scheme);
            browser.wait_for(&format!("matchMedia('(prefers-color-scheme: {scheme})').matches"));
            let faint = browser.value(FAINT);
            assert_eq!(faint, "", "{route}, {scheme}");
        }
        // A telephone's: what is wider is in a box that scrolls by itself.
        browser.size(390, 844);
        browser.wait_for("innerWidth === 390");
        browser.wait_for("document.documentElement.scrollWidth <= 390");
        browser.size(1280, 1000);

        browser.value("document.activeElement.blur()");
        let mut reached = Vec::new();
        for _ in 0..40 {
            browser.tab();
            let focus = "[document.activeElement.textContent.trim(), getComputedStyle(document.activeElement).outlineStyle]";
            let focus = browser.value(focus);
            let text = focus[0].as_str().unwrap_or_default().to_owned();
            assert!(
                focus[1] != "none" || text.len() > 200,
                "{route}: who types does not see that {text} has the focus"
            );
            reached.push(text);
        }
        let wanted: &[&str] =
            if route == "/" { &["a"] } else { &["Pause", "Scale", "Checkpoint now", "Cancel"] };
        for button in wanted {
            assert!(
                reached.iter().any(|text| text == button),
                "{route}: {button} is not reached: {reached:?}"
            );
        }
    }
}
