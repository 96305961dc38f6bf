//! `--http`: metrics for Prometheus and a page for people, of whatever a command trains or keeps.

use std::net::SocketAddr;
use std::path::PathBuf;

use anello_configs::RunConfig;
use anello_coordinator::Rates;
use anello_coordinator::core::Status;
use anello_coordinator::http::{Bound, Keeper, Limits, Server, Site, Tokens};
use anello_coordinator::telemetry::{Board, Traces};
use anello_proto::jobs::Phase;
use anello_store::{Notice, Store, events};
use anello_tls::Protection;
use tokio::runtime::Handle;

use crate::failure::Failure;

/// Arguments of a command that serves HTTP.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Serve metrics for Prometheus (/metrics) and, where a run is kept, figures as JSON and a page for a browser: an
    /// address and a port, 0 for any free one. One that other machines reach needs TLS, or --insecure.
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Who may read, and who may pause, scale and cancel: lines `ROLE NAME TOKEN`, ROLE being viewer or operator. Without
    /// it whoever reaches the address may read, and nobody may change anything.
    #[arg(long, value_name = "FILE", requires = "http")]
    token: Option<PathBuf>,
    /// Peak FLOP/s of one worker's device, as 989e12: metrics tell then which share of it the model reaches.
    #[arg(long, value_name = "FLOPS", requires = "http", value_parser = positive)]
    peak_flops: Option<f64>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value > 0.0 => Ok(value),
        _ => Err("give a number above 0, as 989e12".to_owned()),
    }
}

/// A server that has its address.
#[derive(Debug)]
pub struct Door {
    bound: Bound,
    tokens: Option<Tokens>,
}

impl HttpArgs {
    /// Where it is told how things are.
    pub fn board(&self) -> Board {
        Board::new(self.peak_flops)
    }

    /// The same, which also sends traces where the environment names a collector of them.
    pub fn traced_board(&self, runtime: &Handle) -> Result<Board, Failure> {
        let _runtime = runtime.enter();
        let traces = Traces::from_environment().map_err(|wrong| Failure::Usage(wrong.to_string()))?;
        Ok(self.board().tracing(traces))
    }

    /// Takes the address, if there is to be a server: before anything is begun that it would be in the way of.
    pub fn bind(&self, runtime: &Handle, protection: &Protection) -> Result<Option<Door>, Failure> {
        self.bind_limited(runtime, protection, Rates::DEFAULT)
    }

    /// The same, with these rates of requests.
    pub fn bind_limited(
        &self,
        runtime: &Handle,
        protection: &Protection,
        rates: Rates,
    ) -> Result<Option<Door>, Failure> {
        let Some(address) = self.http else { return Ok(None) };
        let tokens = self.token.as_deref().map(Tokens::read).transpose();
        let tokens = tokens.map_err(|wrong| Failure::Usage(wrong.to_string()))?;
        let limits = Limits { rates, ..Limits::default() };
        let bound = runtime.block_on(Bound::bind(address, protection.clone(), limits))?;
        Ok(Some(Door { bound, tokens }))
    }
}

impl Door {
    /// Serves what `board` knows; with a keeper also its jobs.
    pub fn open(self, runtime: &Handle, board: &Board, keeper: Option<Keeper>) -> Result<Server, Failure> {
        let site = match keeper {
            Some(keeper) => Site::whole(board.clone(), keeper, self.tokens),
            None => Site::metrics(board.clone(), self.tokens),
        };
        let site = site.map_err(|cause| Failure::Ring(format!("{cause}; report this as a bug")))?;
        let _runtime = runtime.enter();
        Ok(self.bound.serve(site))
    }
}

/// The one run of a process, on a board.
#[derive(Debug)]
pub struct Solo {
    board: Board,
    name: String,
    wanted: u32,
}

impl Solo {
    /// Takes a run up, for `wanted` workers.
    pub fn new(board: Board, config: &RunConfig, store: &Store, wanted: u32) -> Result<Self, Failure> {
        let mut recalled = board.recall(&config.name, config, store)?;
        events::each(store, |record| recalled.record(&record))?;
        recalled.take_up();
        board.with(&config.name, |figures| figures.use_store(Some(store.clone())));
        board.set_phase(&config.name, Phase::Forming, wanted);
        Ok(Self { board, name: config.name.clone(), wanted })
    }

    /// Something happened.
    pub fn observe(&self, notice: &Notice) {
        if matches!(notice, Notice::Ready { .. }) {
            self.board.set_phase(&self.name, Phase::Running, self.wanted);
        }
        self.board.observe(&self.name, notice);
    }

    /// How its ring is.
    pub fn set_ring(&self, status: Status) {
        self.board.set_ring(&self.name, status, self.wanted);
    }

    /// It is over, or paused.
    pub fn ended(&self, finished: bool) {
        let phase = if finished { Phase::Completed } else { Phase::Paused };
        self.board.set_phase(&self.name, phase, self.wanted);
    }
}
