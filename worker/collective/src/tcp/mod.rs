//! Members as processes.
