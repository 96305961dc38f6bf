//! What there is of this machine besides its GPUs, as far as a ring depends on it.

use std::fs::read_to_string;

/// Members of a ring that a process without a higher limit is to be fit for.
const MEMBERS: u64 = 256;
/// Open files of a member, besides two connections to each other one.
const FILES: u64 = 128;

/// In words: the kernel, its limits for this process, and the resolver of names.
pub fn checkup() -> Vec<String> {
    let read = |path: &str| read_to_string(path).map_err(|cause| format!("{path}: {cause}"));
    let cores = std::thread::available_parallelism()
        .map_or_else(|cause| cause.to_string(), |cores| cores.to_string());
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_else(|cause| cause);
    let memory = read("/proc/meminfo").map(|told| memory(&told)).unwrap_or_else(|cause| cause);
    vec![
        format!("kernel: {}, {cores} cores for this process, {memory}", kernel.trim()),
        format!("open files: {}", read("/proc/self/limits").map_or_else(|cause| cause, |told| files(&told))),
        format!("names: {}", read("/etc/resolv.conf").map_or_else(|cause| cause, |told| names(&told))),
    ]
}

/// Of `/proc/meminfo`.
fn memory(told: &str) -> String {
    let of = |key: &str| {
        let line = told.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    match (of("MemAvailable"), of("MemTotal")) {
        (Some(free), Some(all)) => format!("{} of {} MiB of memory available", free >> 10, all >> 10),
        _ => "memory of unknown size".to_owned(),
    }
}

/// Of `/proc/self/limits`.
fn files(told: &str) -> String {
    let limit = told.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    match limit {
        None => "limit unknown".to_owned(),
        Some("unlimited") => "no limit".to_owned(),
        Some(limit) => {
            let wanted = 2 * MEMBERS + FILES;
            match limit.parse::<u64>() {
                Ok(few) if few < wanted => {
                    let members = few.saturating_sub(FILES) / 2;
                    format!(
                        "{few}, enough for rings of about {members} members; raise it with `ulimit -n {wanted}` for {MEMBERS}"
                    )
                }
                _ => limit.to_owned(),
            }
        }
    }
}

/// Of `/etc/resolv.conf`.
fn names(told: &str) -> String {
    let servers = told.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim);
    let servers: Vec<&str> = servers.filter(|server| !server.is_empty()).collect();
    match servers.is_empty() {
        true => "no nameserver in /etc/resolv.conf: give addresses, or names of /etc/hosts".to_owned(),
        false => format!("asked of {}", servers.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_told_in_words() {
        assert_eq!(
            memory("MemTotal:  2097152 kB\nMemAvailable: 1024 kB\n"),
            "1 of 2048 MiB of memory available"
        );
        assert_eq!(memory("MemTotal: many\n"), "memory of unknown size");
        let limits = |soft: &str| {
            format!("Limit  Soft Limit  Hard Limit  Units\nMax open files  {soft}  4096  files\n")
        };
        assert_eq!(files(&limits("1048576")), "1048576");
        assert_eq!(files(&limits("unlimited")), "no limit");
        let few = "256, enough for rings of about 64 members; raise it with `ulimit -n 640` for 256";
        assert_eq!(files(&limits("256")), few);
        assert_eq!(files(""), "limit unknown");
        assert_eq!(names("search a\nnameserver 10.0.0.2\nnameserver ::1\n"), "asked of 10.0.0.2, ::1");
        assert!(names("# empty\n").starts_with("no nameserver"));
        assert_eq!(checkup().len(), 3);
    }
}
