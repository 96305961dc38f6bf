//! Accuracy against mean depth as an SVG that needs nothing else. Pure.

use anello_worker::evaluate::Sums;

use super::Told;

/// Size of the picture and of the margins around what is plotted: left, right, top, bottom.
const SIZE: (f64, f64) = (640.0, 420.0);
const MARGINS: [f64; 4] = [64.0, 24.0, 56.0, 72.0];
/// Lines of the grid across the accuracies, about.
const LINES: f64 = 5.0;

/// A curve over the exit masses, each point with its q, and the loop steps that all tokens leave at, to compare with.
pub(super) fn svg(told: &Told<'_>) -> String {
    let found = told.found;
    let counted = found.counted as f64;
    let point = |sums: &Sums| (sums.depth / counted, sums.correct as f64 / counted);
    let by_step: Vec<(f64, f64)> = found.steps.iter().map(point).collect();
    let by_mass: Vec<(f64, (f64, f64))> = found.by_mass.iter().map(|(q, sums)| (*q, point(sums))).collect();
    let accuracies =
        by_step.iter().chain(by_mass.iter().map(|(_, point)| point)).map(|(_, accuracy)| *accuracy);
    let (low, high) =
        accuracies.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), a| (low.min(a), high.max(a)));
    let pad = ((high - low) * 0.12).max(0.002);
    let (low, high) = ((low - pad).max(0.0), (high + pad).min(1.0));
    let deepest = found.steps.len().max(2) as f64;
    let [left, right, top, bottom] = MARGINS;
    let (wide, tall) = (SIZE.0 - left - right, SIZE.1 - top - bottom);
    let x = |depth: f64| left + wide * (depth - 1.0) / (deepest - 1.0);
    let y = |accuracy: f64| top + tall * (high - accuracy) / (high - low);

    let mut body = String::new();
    let text = |x: f64, y: f64, anchor: &str, class: &str, words: &str| {
        let words = escape(words);
        format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{words}</text>\n")
    };
    let heading = format!("{}, {}", told.title(), told.counted());
    body += &text(left, 24.0, "start", "title", "Accuracy against mean depth");
    body += &text(left, 42.0, "start", "", &heading);
    let step = step_of((high - low) / LINES);
    let mut line = (low / step).ceil();
    while line * step <= high {
        let (at, percent) = (y(line * step), line * step * 100.0);
        body += &format!(
            "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" class=\"grid\"/>\n",
            left + wide
        );
        let digits = if step >= 0.01 { 0 } else { 2 };
        body += &text(left - 8.0, at + 4.0, "end", "", &format!("{percent:.digits$} %"));
        line += 1.0;
    }
    for t in 1..=found.steps.len() {
        body += &text(x(t as f64), top + tall + 20.0, "middle", "", &t.to_string());
    }
    body += &text(left + wide / 2.0, top + tall + 38.0, "middle", "", "mean depth, loop steps");
    for (t, (depth, accuracy)) in (1..).zip(&by_step) {
        body += &format!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" class=\"step\"><title>all leave at loop step {t}: {:.2} %</title></circle>\n",
            x(*depth),
            y(*accuracy),
            accuracy * 100.0
        );
    }
    let path: Vec<String> = by_mass
        .iter()
        .map(|(_, (depth, accuracy))| format!("{:.1},{:.1}", x(*depth), y(*accuracy)))
        .collect();
    body += &format!("<polyline points=\"{}\" class=\"curve\"/>\n", path.join(" "));
    let mut written = f64::NEG_INFINITY;
    for (q, (depth, accuracy)) in &by_mass {
        let (px, py) = (x(*depth), y(*accuracy));
        body += &format!(
            "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" class=\"mass\"><title>q = {q:.1}: depth {depth:.2}, {:.2} %</title></circle>\n",
            accuracy * 100.0
        );
        // Points may lie close together, or on one another: their labels do not.
        if px - written > 26.0 {
            body += &text(px, py - 9.0, "middle", "", &format!("{q:.1}"));
            written = px;
        }
    }
    let legend =
        "line: leaving once the exit mass reaches q (its label); rings: all tokens leave at one loop step";
    body += &text(left + wide / 2.0, SIZE.1 - 10.0, "middle", "faint", legend);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" role=\"img\">\n<style>{STYLE}</style>\n<rect width=\"{w}\" height=\"{h}\" class=\"paper\"/>\n{body}</svg>\n",
        w = SIZE.0,
        h = SIZE.1
    )
}

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#333}.title{font-size:15px;font-weight:600}\
.faint{fill:#777;font-size:10.5px}.paper{fill:#fff}.grid{stroke:#ddd}.curve{fill:none;stroke:#1c6fb0;stroke-width:2}\
.mass{fill:#1c6fb0}.step{fill:none;stroke:#d98a00;stroke-width:2}";

/// 1, 2 or 5 times a power of ten, at least `raw`.
fn step_of(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let unit = [1.0, 2.0, 5.0].into_iter().find(|unit| unit * power >= raw).unwrap_or(10.0);
    unit * power
}

/// Text as XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use anello_worker::evaluate::Evaluation;

    use super::*;

    fn evaluation() -> Evaluation {
        let mut found = Evaluation::new(4, &[0.3, 0.6, 0.9]);
        found.counted = 1000;
        let sums = |depth: f64, correct: u64| Sums { loss: 3000.0, correct, depth: depth * 1000.0 };
        found.steps = (1..=4).map(|t| sums(t as f64, 300 + 40 * t)).collect();
        for ((_, of_q), (depth, correct)) in
            found.by_mass.iter_mut().zip([(1.5, 330), (2.5, 390), (3.5, 440)])
        {
            *of_q = sums(depth, correct);
        }
        found
    }

    #[test]
    fn every_point_is_there_and_nothing_in_a_name_can_break_it() {
        let text = svg(&Told { name: "a<b>&c", of: "data/tales", what: "tokens", found: &evaluation() });
        assert!(text.contains("a&lt;b&gt;&amp;c on data/tales, 1 000 tokens") && !text.contains("a<b>"));
        assert_eq!(text.matches("class=\"step\"").count(), 4);
        assert_eq!(text.matches("class=\"mass\"").count(), 3);
        assert!(text.contains("<title>q = 0.6: depth 2.50, 39.00 %</title>"), "{text}");
        for tag in ["svg", "style", "text", "circle", "title"] {
            let open = text.matches(&format!("<{tag}")).count() - text.matches(&format!("<{tag}s")).count();
            assert_eq!(open, text.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        // Deeper is further right, better is higher.
        let points = text.split_once("points=\"").unwrap().1.split_once('"').unwrap().0;
        let points: Vec<(f64, f64)> = points
            .split(' ')
            .map(|point| point.split_once(',').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect();
        assert!(points.is_sorted_by(|a, b| a.0 < b.0 && a.1 > b.1), "{points:?}");
    }

    #[test]
    fn grids_are_round() {
        assert_eq!(
            [0.011, 0.02, 0.03, 0.06].map(|raw| (step_of(raw) * 100.0).round()),
            [2.0, 2.0, 5.0, 10.0]
        );
    }

    #[test]
    fn a_model_that_is_always_right_has_a_picture_too() {
        let mut found = evaluation();
        found.steps.truncate(1);
        found.steps.iter_mut().chain(found.by_mass.iter_mut().map(|(_, sums)| sums)).for_each(|sums| {
            (sums.correct, sums.depth) = (1000, 1000.0);
        });
        let text = svg(&Told { name: "a", of: "b", what: "tokens", found: &found });
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
