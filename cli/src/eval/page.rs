//! An evaluation as one HTML page that needs nothing else: figures of each loop step, of each q, and the picture. Pure.

use anello_worker::evaluate::Evaluation;

use super::{Told, figures, plot};

/// The page of what was found.
pub(super) fn html(told: &Told<'_>) -> String {
    let Evaluation { counted, steps, exit, by_mass } = told.found;
    let title = plot::escape(&told.title());
    let percent = |share: f64| format!("{:.2} %", share * 100.0);
    let of_steps = steps.iter().zip(exit).enumerate().map(|(at, (sums, exit))| {
        let (loss, accuracy, _) = figures(sums, *counted);
        let leaves = percent(exit / *counted as f64);
        vec![
            (at + 1).to_string(),
            format!("{loss:.4}"),
            format!("{:.2}", loss.exp()),
            percent(accuracy),
            leaves,
        ]
    });
    let of_masses = by_mass.iter().map(|(q, sums)| {
        let (loss, accuracy, depth) = figures(sums, *counted);
        vec![format!("{q:.1}"), format!("{depth:.2}"), format!("{loss:.4}"), percent(accuracy)]
    });
    let by_step = table(&["loop step", "loss", "perplexity", "accuracy", "leaves here"], of_steps);
    let by_q = table(&["q", "mean depth", "loss", "accuracy"], of_masses);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{}</p>\n\
         <figure>\n{}</figure>\n<h2>At each loop step</h2>\n{by_step}\
         <h2>Leaving once so much exit mass is behind a token</h2>\n{by_q}</body>\n</html>\n",
        told.counted(),
        plot::svg(told),
    )
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: String = head.iter().map(|cell| format!("<th scope=\"col\">{cell}</th>")).collect();
    let row = |cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = rows.map(row).collect();
    format!("<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n")
}

const STYLE: &str = ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;\
padding:0 1rem;color:#222;background:#fff}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}figure{margin:1rem 0}\
svg{max-width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ccc}th{font-weight:600}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}th,td{border-color:#444}}";

#[cfg(test)]
mod tests {
    use anello_worker::evaluate::Sums;

    use super::*;

    #[test]
    fn the_page_has_every_figure_and_needs_nothing_else() {
        let mut found = Evaluation::new(2, &[0.5]);
        found.counted = 1000;
        found.steps = vec![
            Sums { loss: 3000.0, correct: 250, depth: 1000.0 },
            Sums { loss: 2500.0, correct: 500, depth: 2000.0 },
        ];
        found.exit = vec![400.0, 600.0];
        found.by_mass[0].1 = Sums { loss: 2600.0, correct: 450, depth: 1500.0 };
        let page = html(&Told { name: "a<b>&c", of: "data/tales", what: "tokens that count", found: &found });
        assert!(
            page.starts_with("<!doctype html>")
                && page.contains("<title>a&lt;b&gt;&amp;c on data/tales</title>")
        );
        assert!(!page.contains("a<b>"), "{page}");
        assert!(
            page.contains("<tr><td>2</td><td>2.5000</td><td>12.18</td><td>50.00 %</td><td>60.00 %</td></tr>")
        );
        assert!(page.contains("<tr><td>0.5</td><td>1.50</td><td>2.6000</td><td>45.00 %</td></tr>"), "{page}");
        assert!(page.contains("<svg ") && page.contains("1 000 tokens that count"));
        for outside in ["<script", "<link", "src=", "href=", "url(", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for tag in ["html", "head", "body", "table", "thead", "tbody", "figure", "svg"] {
            let count = |text: String| page.matches(&text).count();
            let open = count(format!("<{tag}>")) + count(format!("<{tag} "));
            assert_eq!(open, count(format!("</{tag}>")), "{tag}");
        }
    }
}
