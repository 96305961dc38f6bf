//! Ctrl-C and SIGTERM: the first asks, the second leaves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::failure::LEFT_AT_ONCE;

/// Whether somebody asked to stop.
#[derive(Clone, Debug)]
pub struct Interrupt {
    raised: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C and SIGTERM for the rest of the process. A second one ends it in the signal handler itself, so
    /// that nothing which hangs can keep it.
    pub fn watch() -> io::Result<Self> {
        let (flag, terminated) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        // Before the other flag, which makes it be looked at.
        signal_hook::flag::register(SIGTERM, terminated.clone())?;
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal must not find the flag that it raises itself.
            signal_hook::flag::register_conditional_shutdown(signal, LEFT_AT_ONCE, flag.clone())?;
            signal_hook::flag::register(signal, flag.clone())?;
        }
        Ok(Self { raised: flag, terminated })
    }

    /// What is raised, for others to look at.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.raised.clone()
    }

    /// Whether one came.
    pub fn raised(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    /// Whether SIGTERM came: from whoever looks after processes, and not from a keyboard.
    pub fn terminated(&self) -> bool {
        self.terminated.load(Ordering::Relaxed)
    }
}
