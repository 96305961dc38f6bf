//! A config of any text is problems or a run; a run's own text is the same run, and its schedule is total.

#![no_main]

use anello_configs::{RunConfig, Schedule};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let config = match RunConfig::parse("fuzz.toml", text) {
        Ok(config) => config,
        Err(problems) => return drop(problems.to_string()),
    };
    let again = RunConfig::parse("resolved.toml", &config.to_toml()).expect("a run's own text is a run");
    assert!(again == config, "it reads back as another run");
    let schedule = Schedule::new(&config);
    let total = schedule.total_steps();
    for step in [0, total / 2, total - 1] {
        let plan = schedule.at(step).expect("there is a plan for every step");
        assert!(plan.lr.is_finite() && plan.lr >= 0.0);
    }
    assert!(schedule.at(total).is_none());
});
