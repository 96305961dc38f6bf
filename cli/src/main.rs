//! The `anello` command.
//!
//! ```text
//! thin shells   run         train or resume            data         tokenize, index, inspect, …
//!               config      config, plan               checkpoint   list, verify, diff
//!               log         events, metrics            report       one HTML page
//!               tensorboard metrics as an event file
//!               worker      a worker process of a ring    coordinator  several jobs, as a service
//!               jobs        submit, list, watch, top, pause, … at a coordinator
//!               certs       a private CA, and how other commands are given its certificates
//!               interchange export, import             generate, eval
//!                                                      weights      a model by its name
//!               kube        a PretrainJob, its controller
//!               bisect      why two runs are not the same        doctor   is a store fit for runs?
//!               audit       is a run what its record says?
//!               dashboards  for Grafana and Prometheus    http       `--http` of any of them
//! shared        screen      where progress is drawn    interrupt    Ctrl-C: the first asks, the second leaves
//!               waiting     LibTorch's threads sleep    trace        a timeline of steps
//!               failure     exit codes                 place        what a user calls a run: RUN, RUN@STEP
//! pure          text        numbers, times, tables     difference  of two computations of a step
//!               stages      what became of each stage
//! ```

mod audit;
mod bisect;
mod certs;
mod checkpoint;
mod config;
mod coordinator;
mod dashboards;
mod data;
mod difference;
mod doctor;
mod eval;
mod failure;
mod generate;
mod http;
mod interchange;
mod interrupt;
mod jobs;
mod kube;
mod log;
mod place;
mod report;
mod run;
mod screen;
mod stages;
mod tensorboard;
mod text;
mod tokenizer;
mod trace;
mod waiting;
mod weights;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::{EXIT_CODES, Exit, Outcome};
use screen::Screen;

/// Pretrains looped language models, to the same bits wherever and however often it is interrupted.
#[derive(Debug, Parser)]
#[command(name = "anello", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What is logged to standard error, as `info` or `anello_worker=debug` (default: RUST_LOG, or warnings).
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// Append a timeline of the first 20 steps to this file, those of the workers started from here included: open it in
    /// Perfetto (ui.perfetto.dev).
    #[arg(long, global = true, value_name = "FILE", env = trace::VARIABLE)]
    trace: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a run, or go on with one.
    Run(run::Args),
    /// Serve some lanes of a run under a coordinator. `anello run --workers` starts these.
    Worker(worker::Args),
    /// Keep the jobs of one place: a queue, a ring of worker processes for each, and the user's commands.
    Coordinator(coordinator::Args),
    /// Put a job into a coordinator's queue, or into a Kubernetes cluster.
    Submit(Box<jobs::SubmitArgs>),
    /// List a coordinator's jobs.
    List(jobs::ListArgs),
    /// Tell all that there is to see of a job.
    Describe(jobs::JobArgs),
    /// Tell what happened in a job.
    Logs(jobs::LogsArgs),
    /// Show how a job goes, until it is over.
    Watch(jobs::JobArgs),
    /// Show where the time of a job's workers goes, and which of them are slow.
    Top(jobs::JobArgs),
    /// Take a checkpoint of a job and stop it until it is resumed.
    Pause(jobs::JobArgs),
    /// Put a paused job back into the queue.
    Resume(jobs::JobArgs),
    /// Give a job another number of workers.
    Scale(jobs::ScaleArgs),
    /// Stop a job for good.
    Cancel(jobs::JobArgs),
    /// Print the definition of the PretrainJob resource, for `kubectl apply -f -`.
    Crd(kube::CrdArgs),
    /// Look after the PretrainJobs of a Kubernetes cluster.
    Controller(kube::ControllerArgs),
    /// Make a private CA and its certificates, for TLS between machines.
    #[command(subcommand)]
    Certs(certs::Command),
    /// Say what a run would take: steps, parameters, memory, time.
    Plan(config::PlanArgs),
    /// Print the config with all its layers and defaults resolved.
    Config(config::ShowArgs),
    /// Make, look at and check token sets.
    #[command(subcommand)]
    Data(data::Command),
    /// Continue text with a model, token by token.
    Generate(generate::Args),
    /// Say what a model is worth at each loop step on held-out data.
    Eval(eval::Args),
    /// Write a checkpoint in the published Ouro layout of Hugging Face.
    Export(interchange::ExportArgs),
    /// Make a run that begins with weights in that layout.
    Import(interchange::ImportArgs),
    /// Look at the checkpoints of runs.
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Find the first step, phase, lane and block in which two runs differ. Exit code 0: they are equal; 1: they differ.
    Bisect(bisect::Args),
    /// Compute a run's steps again and compare them with its record, bit for bit. Exit code 0: it is what it says; 1: it
    /// is not.
    Audit(audit::Args),
    /// Try out whether runs may live at a place; without one, whether they may use this machine's GPUs; with --kube, whether
    /// a cluster looks after PretrainJobs. Exit code 0: they may, or it does; 1: not.
    Doctor(doctor::Args),
    /// Tell what happened in a run.
    Events(log::EventsArgs),
    /// Print the metrics of a run, one row a step.
    Metrics(log::MetricsArgs),
    /// Write what Grafana and Prometheus are given: dashboards and alert rules on the metrics of `--http`.
    Dashboards(dashboards::Args),
    /// Write a run's report: one HTML page with charts that needs nothing else.
    Report(report::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let computes = matches!(
        cli.command,
        Command::Run(_)
            | Command::Worker(_)
            | Command::Generate(_)
            | Command::Eval(_)
            | Command::Bisect(_)
            | Command::Audit(_)
    );
    if computes {
        waiting::sleep_while_waiting();
    }
    let screen = Screen::new(cli.trace);
    let outcome =
        screen.log(cli.log.as_deref()).map(|()| Exit::Done).and_then(|_| command(cli.command, &screen));
    let _ = screen.clear();
    match outcome {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", failure.text());
            ExitCode::from(failure.code())
        }
    }
}

fn command(command: Command, screen: &Screen) -> Outcome {
    match command {
        Command::Run(args) => run::run(&args, screen),
        Command::Worker(args) => worker::run(&args),
        Command::Coordinator(args) => coordinator::run(&args, screen),
        Command::Submit(args) => jobs::submit(&args, screen),
        Command::List(args) => jobs::list(&args, screen),
        Command::Describe(args) => jobs::describe(&args, screen),
        Command::Logs(args) => jobs::logs(&args, screen),
        Command::Watch(args) => jobs::watch(&args, screen),
        Command::Top(args) => jobs::top(&args, screen),
        Command::Pause(args) => jobs::pause(&args, screen),
        Command::Resume(args) => jobs::resume(&args, screen),
        Command::Scale(args) => jobs::scale(&args, screen),
        Command::Cancel(args) => jobs::cancel(&args, screen),
        Command::Crd(args) => kube::crd(&args, screen),
        Command::Controller(args) => kube::controller(&args, screen),
        Command::Certs(command) => certs::run(&command, screen),
        Command::Plan(args) => config::plan(&args, screen),
        Command::Config(args) => config::show(&args, screen),
        Command::Data(command) => data::run(&command, screen),
        Command::Checkpoint(command @ checkpoint::Command::Diff { .. }) => {
            comparison(checkpoint::run(&command, screen))
        }
        Command::Checkpoint(command) => checkpoint::run(&command, screen),
        Command::Bisect(args) => comparison(bisect::run(&args, screen)),
        Command::Audit(args) => comparison(audit::run(&args, screen)),
        Command::Doctor(args) => comparison(doctor::run(&args, screen)),
        Command::Generate(args) => generate::run(&args, screen),
        Command::Eval(args) => eval::run(&args, screen),
        Command::Export(args) => interchange::export(&args, screen),
        Command::Import(args) => interchange::import(&args, screen),
        Command::Events(args) => log::events(&args, screen),
        Command::Metrics(args) => log::metrics(&args, screen),
        Command::Dashboards(args) => dashboards::run(&args, screen),
        Command::Report(args) => report::run(&args, screen),
    }
}

/// As diff(1) and cmp(1) have it: 1 means that they differ, so trouble must be something else.
fn comparison(outcome: Outcome) -> Outcome {
    outcome.map_err(|failure| match failure.is_closed_pipe() {
        true => failure,
        false => failure::Failure::Usage(failure.text()),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
