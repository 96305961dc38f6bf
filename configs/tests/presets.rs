//! The presets and recipes against the tables of the paper.

use anello_configs::*;

fn preset(name: &str) -> RunConfig {
    match RunConfig::load(&LoadOptions::new(name)) {
        Ok(loaded) => loaded.config,
        Err(error) => panic!("{name}: {error}"),
    }
}

#[test]
fn every_preset_survives_being_written_down() {
    for name in presets() {
        let config = preset(name);
        let again = RunConfig::parse("resolved", &config.to_toml()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again, config);
        assert_eq!(again.digest(), config.digest());
    }
}
