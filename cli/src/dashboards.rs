//! `anello dashboards`: what Grafana and Prometheus are given.

use std::path::{Path, PathBuf};

use anello_coordinator::telemetry::{dashboards, reference, rules};

use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;

/// Arguments of `anello dashboards`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to write to: `dashboards/*.json` for Grafana, `rules/anello.yaml` for Prometheus.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Also write the list of all metrics and alerts to this file.
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
}

/// `anello dashboards`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    let mut files = vec![(args.to.join("rules/anello.yaml"), rules::render(&rules::Limits::default()))];
    for dashboard in dashboards::DASHBOARDS {
        let path = args.to.join("dashboards").join(format!("{}.json", dashboard.name));
        files.push((path, dashboards::render(dashboard)));
    }
    files.extend(args.reference.iter().map(|path| (path.clone(), reference::render())));
    for (path, text) in &files {
        write(path, text)?;
        screen.line(&path.display().to_string())?;
    }
    Ok(Exit::Done)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |source| Failure::File { action: "writing", path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    std::fs::write(path, text).map_err(failed)
}
