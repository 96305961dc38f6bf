//! `anello doctor`: is a store fit for runs, is a coordinator reached from here, are PretrainJobs looked after in a cluster, what
//! is there of this machine and its GPUs, are the fused kernels right on them, and how fast is the sum over them?

mod cluster;
mod machine;
mod way;

use anello_configs::ComputeDevice;
use anello_store::Store;
use anello_store::doctor::{self, Checkup, Latency, Raced};
use anello_worker::device;
use anello_worker::kernels::{self, Checked, Kernels, Sizes};
use anello_worker::ring::Speed;

use crate::certs::TlsArgs;
use crate::failure::{Exit, Outcome};
use crate::screen::Screen;
use crate::text::{bytes as bytes_in_words, short};

/// Arguments of `anello doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A folder, or a URL: s3://BUCKET/PREFIX, gs://…, az://…. Small objects are written there, and removed.
    /// Without one: this machine, its GPUs, and what is needed to compute on them.
    #[arg(value_name = "PLACE")]
    place: Option<String>,
    /// Try out whether a coordinator is reached from here instead: host:port. Its name, the way there, certificates, and
    /// whether it answers.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "place")]
    coordinator: Option<String>,
    /// Try out the fused kernels of `compute.fused` on a GPU instead, or on the one that is named (cuda:1): each against
    /// LibTorch, its results and its time. It takes some 10 GB of the GPU's memory, and less than a minute.
    #[arg(long, value_name = "DEVICE", num_args = 0..=1, default_missing_value = "cuda", conflicts_with_all = ["place", "coordinator", "kube"])]
    kernels: Option<ComputeDevice>,
    /// Try out the sum of `ring.transport = "nccl"` over the GPUs of this machine instead, or over so many ranks: is it right, and how
    /// fast is it beside `ncclAllReduce`? It takes some 5 GB of each GPU's memory, and seconds.
    #[arg(long, value_name = "RANKS", num_args = 0..=1, conflicts_with_all = ["place", "coordinator", "kernels", "kube"])]
    nccl: Option<Option<u32>>,
    /// Ask a Kubernetes cluster instead, that of the current kubeconfig or of the pod that this is in: is the definition of
    /// PretrainJobs served, may the controller do what it must, and does one do it? With --tls: are its certificates good?
    #[arg(long, conflicts_with_all = ["place", "coordinator"])]
    kube: bool,
    /// Namespace of the controller (default: that of the kubeconfig's context).
    #[arg(long, value_name = "NAME", requires = "kube")]
    namespace: Option<String>,
    /// All that was found, as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: TlsArgs,
}

/// `anello doctor`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    if let Some(coordinator) = &args.coordinator {
        let (reached, lines) = way::checkup(coordinator, &args.tls);
        let answer = if reached { "is reached from here" } else { "is not reached from here" };
        return found(
            &format!("the coordinator at {coordinator} {answer}"),
            "reached",
            reached,
            &lines,
            args,
            screen,
        );
    }
    if let Some(device) = args.kernels {
        let device = device::open(device)?;
        let found = kernels::check(&Kernels::open(device)?, device, Sizes::OURO);
        let right = found.iter().all(Checked::is_right);
        let answer = if right {
            "are right on this GPU"
        } else {
            "are NOT right on this GPU: leave compute.fused out"
        };
        let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
        return self::found(&format!("the fused kernels {answer}"), "right", right, &lines, args, screen);
    }
    if let Some(ranks) = args.nccl {
        return sum(ranks, args, screen);
    }
    if args.kube {
        let checkup = cluster::checkup(args.namespace.as_deref(), &args.tls)?;
        let answer = if checkup.fit { "are looked after" } else { "are not looked after as they must be" };
        let answer = format!("PretrainJobs {answer} in this cluster");
        return found(&answer, "fit", checkup.fit, &checkup.found, args, screen);
    }
    let Some(place) = &args.place else {
        let (fit, gpus) = device::checkup();
        let whose = if fit { "the GPUs" } else { "the CPU" };
        let lines = [gpus, machine::checkup()].concat();
        return found(&format!("runs compute on {whose} of this machine"), "gpus", fit, &lines, args, screen);
    };
    let checkup = doctor::check(&Store::durable(place)?)?;
    screen.print(&match args.json {
        true => serde_json::to_string_pretty(&checkup).expect("a check-up has string keys") + "\n",
        false => told(&checkup),
    })?;
    Ok(if checkup.is_fit() { Exit::Done } else { Exit::No })
}

/// Bytes that each rank adds up: what a figure of bus bandwidth is commonly of.
const SUM_BYTES: u64 = 1 << 30;

/// The sum over GPUs, tried out.
fn sum(ranks: Option<u32>, args: &Args, screen: &Screen) -> Outcome {
    let speed = anello_worker::ring::measure(ranks.map(|ranks| ranks as usize), SUM_BYTES)?;
    screen.print(&match args.json {
        true => {
            let mut value = serde_json::to_value(&speed).expect("a speed has string keys");
            value["bus_gb_per_s"] = speed.bus_gb_per_s(speed.seconds).into();
            value["all_reduce_bus_gb_per_s"] = speed.bus_gb_per_s(speed.all_reduce_seconds).into();
            value["share"] = speed.share().into();
            value.to_string() + "\n"
        }
        false => told_of_sum(&speed),
    })?;
    Ok(if speed.right { Exit::Done } else { Exit::No })
}

fn told_of_sum(speed: &Speed) -> String {
    let Speed { nccl, gpus, ranks, bytes, seconds, all_reduce_seconds, right } = speed;
    let answer = match right {
        true => format!("reaches {:.0} % of ncclAllReduce's bus bandwidth", 100.0 * speed.share()),
        false => "is NOT that of ncclAllReduce: train by ring.transport = \"tcp\"".to_owned(),
    };
    let line = |what: &str, seconds: f64| {
        format!("{what} {:>9} ms  {:>7.1} GB/s", short(1e3 * seconds), speed.bus_gb_per_s(seconds))
    };
    format!(
        "the sum of ring.transport = \"nccl\" {answer}
  {nccl}, {ranks} ranks on {gpus} GPUs, {} of fp32 each: medians, and bus bandwidths
  {}
  {}
",
        bytes_in_words(*bytes),
        line("a ring's     ", *seconds),
        line("ncclAllReduce", *all_reduce_seconds),
    )
}

/// An answer, and what it follows from.
fn found(answer: &str, key: &str, yes: bool, lines: &[String], args: &Args, screen: &Screen) -> Outcome {
    screen.print(&match args.json {
        true => serde_json::json!({ key: yes, "found": lines }).to_string() + "\n",
        false => format!("{answer}\n  {}\n", lines.join("\n  ")),
    })?;
    Ok(if yes { Exit::Done } else { Exit::No })
}

/// The answer first.
fn told(checkup: &Checkup) -> String {
    let Checkup { place, faults, raced, latency, clock_ahead_s } = checkup;
    let Raced { fair, races, writers, .. } = raced;
    let Latency { put_ms, create_ms, get_ms, list_ms } = latency;
    let [put, create, get, list] = [put_ms, create_ms, get_ms, list_ms].map(|ms| short(*ms));
    let answer = match faults.len() {
        0 => "is fit for runs and coordinators",
        _ => "is not fit for runs",
    };
    let mut lines = vec![format!("{place} {answer}")];
    lines.extend(faults.iter().map(|fault| format!("  {fault}")));
    lines.push(format!("put-if-absent: one winner in {fair} of {races} races of {writers} writers"));
    lines.push(match clock_ahead_s {
        Some(ahead) => format!("clock: within {} s of ours", ahead.abs().ceil()),
        None => "clock: the store does not tell".to_owned(),
    });
    lines.push(format!("one call takes: write {put} ms, create {create} ms, read {get} ms, list {list} ms"));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_told_beside_nccls_own() {
        let mut speed = Speed {
            nccl: "NCCL 2.28.9".to_owned(),
            gpus: 2,
            ranks: 2,
            bytes: 1 << 30,
            seconds: 0.0112,
            all_reduce_seconds: 0.0104,
            right: true,
        };
        assert_eq!(
            told_of_sum(&speed),
            "the sum of ring.transport = \"nccl\" reaches 93 % of ncclAllReduce's bus bandwidth
  NCCL 2.28.9, 2 ranks on 2 GPUs, 1.07 GB of fp32 each: medians, and bus bandwidths
  a ring's           11.2 ms     95.9 GB/s
  ncclAllReduce      10.4 ms    103.2 GB/s
"
        );
        speed.right = false;
        assert!(told_of_sum(&speed).contains("is NOT that of ncclAllReduce"));
    }

    #[test]
    fn the_answer_comes_first() {
        let mut checkup = Checkup {
            place: "s3://bucket/runs".to_owned(),
            faults: Vec::new(),
            raced: Raced { fair: 20, races: 20, writers: 16, winners_most: 1 },
            latency: Latency { put_ms: 12.34, create_ms: 0.5, get_ms: 7.0, list_ms: 100.2 },
            clock_ahead_s: Some(-0.3),
        };
        assert_eq!(
            told(&checkup),
            "s3://bucket/runs is fit for runs and coordinators
put-if-absent: one winner in 20 of 20 races of 16 writers
clock: within 1 s of ours
one call takes: write 12.3 ms, create 0.500 ms, read 7.00 ms, list 100 ms
"
        );
        checkup.faults = vec!["put-if-absent is not atomic there".to_owned()];
        assert!(
            told(&checkup)
                .starts_with("s3://bucket/runs is not fit for runs\n  put-if-absent is not atomic there\n")
        );
    }
}
