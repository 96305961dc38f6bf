//! The way from here to a coordinator, in the order in which it is gone: name, packets, certificates, answers.

use std::io::ErrorKind;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::certs::TlsArgs;
use crate::jobs;
use crate::text::short;

/// For an answer to the first packet.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether the coordinator at `address` is reached with these certificates, and what was found on the way, in words.
pub fn checkup(address: &str, tls: &TlsArgs) -> (bool, Vec<String>) {
    let mut lines = Vec::new();
    let began = Instant::now();
    let known = address.to_socket_addrs().map(Vec::from_iter);
    let took = |since: Instant| short(since.elapsed().as_secs_f64() * 1e3);
    let known = match known {
        Ok(known) => known,
        Err(cause) => {
            let remedy = match cause.kind() {
                ErrorKind::InvalidInput => "give it as host:port",
                _ => {
                    "look at the name (in Kubernetes NAME.NAMESPACE.svc) and at the resolver, /etc/resolv.conf"
                }
            };
            return (false, vec![format!("name: {cause}; {remedy}")]);
        }
    };
    let told: Vec<String> = known.iter().map(|known| known.ip().to_string()).collect();
    lines.push(format!("name: {} after {} ms", told.join(", "), took(began)));
    let mut there = false;
    for known in known {
        let began = Instant::now();
        lines.push(match TcpStream::connect_timeout(&known, PATIENCE) {
            Ok(_) => {
                there = true;
                format!("way: {known} answers after {} ms", took(began))
            }
            Err(cause) => format!("way: {known} {}", no_way(&cause)),
        });
    }
    if !there {
        return (false, lines);
    }
    let began = Instant::now();
    let listed = jobs::count(address, tls);
    let answers = listed.is_ok();
    lines.push(match listed {
        Ok(1) => format!("coordinator: answers after {} ms; it has 1 job", took(began)),
        Ok(jobs) => format!("coordinator: answers after {} ms; it has {jobs} jobs", took(began)),
        Err(failure) => format!("coordinator: {}", failure.text()),
    });
    (answers, lines)
}

/// Why nobody is reached at an address, and what to look at.
fn no_way(cause: &std::io::Error) -> String {
    match cause.kind() {
        ErrorKind::ConnectionRefused => {
            "refuses: the machine is there, and nobody listens at this port".to_owned()
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => {
            let seconds = PATIENCE.as_secs();
            format!("does not answer within {seconds} s: look at firewalls and NetworkPolicies on the way")
        }
        _ => cause.to_string(),
    }
}
