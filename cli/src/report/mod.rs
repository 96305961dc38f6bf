//! stub
use crate::{failure::{Exit, Outcome}, screen::Screen};
#[derive(Debug, clap::Args)]
pub struct Args { run: String }
pub fn run(_args: &Args, _screen: &Screen) -> Outcome { Ok(Exit::Done) }
