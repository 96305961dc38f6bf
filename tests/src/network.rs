//! Hosts of networks of their own: network namespaces on one switch or several, whose cables can be pulled.

use std::path::PathBuf;
use std::process::Command;

/// Hosts that reach one another, and nothing else, over switches of their own: each has a card and an address at each.
#[derive(Debug)]
pub struct Network {
    name: String,
    hosts: u32,
    switches: u32,
}

/// `ip WORDS`: what it prints; the error is what it says.
fn ip(words: &str) -> Result<String, String> {
    let done = Command::new("ip").args(words.split(' ')).output().map_err(|cause| format!("ip: {cause}"))?;
    let told = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() { Ok(printed) } else { Err(format!("ip {words}: {told}")) }
}

/// The ports, near and far, of the connection on which most was sent, of those that `ss -Htin` tells of: a line of each, and
/// one of what was seen of it.
fn busiest(told: &str) -> Option<(u16, u16)> {
    let lines: Vec<&str> = told.lines().collect();
    let seen = lines.chunks_exact(2).filter_map(|pair| {
        let port = |at: usize| pair[0].split_whitespace().nth(at)?.rsplit_once(':')?.1.parse().ok();
        let sent = pair[1].split_whitespace().find_map(|word| word.strip_prefix("bytes_sent:"))?;
        Some((sent.parse::<u64>().ok()?, (port(3)?, port(4)?)))
    });
    seen.max().map(|(_, ports)| ports)
}

/// A host's card at a switch.
fn card(switch: u32) -> String {
    format!("net{switch}")
}

/// The end of its cable there.
fn cable(host: u32, switch: u32) -> String {
    format!("cable{host}-{switch}")
}

impl Network {
    /// A network of `hosts` on so many switches, or why this user may not make one here.
    ///
    /// # Errors
    /// In words, when `ip` is missing or the kernel refuses.
    pub fn new(name: &str, hosts: u32, switches: u32) -> Result<Self, String> {
        let name = format!("anello-{}-{name}", std::process::id());
        let network = Self { name, hosts, switches };
        network.make()?;
        Ok(network)
    }

    fn make(&self) -> Result<(), String> {
        let switch = self.switch();
        ip(&format!("netns add {switch}"))?;
        for at in 0..self.switches {
            ip(&format!("-n {switch} link add switch{at} type bridge"))?;
            ip(&format!("-n {switch} link set switch{at} up"))?;
        }
        for host in 0..self.hosts {
            let space = self.space(host);
            ip(&format!("netns add {space}"))?;
            ip(&format!("-n {space} link set lo up"))?;
            for at in 0..self.switches {
                let (card, cable, address) = (card(at), cable(host, at), self.address_at(host, at));
                ip(&format!("-n {space} link add {card} type veth peer name {cable} netns {switch}"))?;
                ip(&format!("-n {space} address add {address}/24 dev {card}"))?;
                ip(&format!("-n {space} link set {card} up"))?;
                ip(&format!("-n {switch} link set {cable} master switch{at} up"))?;
            }
        }
        Ok(())
    }

    /// Where the switches are.
    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn space(&self, host: u32) -> String {
        format!("{}-{host}", self.name)
    }

    /// The address of a host at the first switch.
    pub fn address(&self, host: u32) -> String {
        self.address_at(host, 0)
    }

    /// That at another one.
    pub fn address_at(&self, host: u32, switch: u32) -> String {
        format!("10.213.{}.{}", 7 + switch, host + 1)
    }

    /// What a command line begins with that is to run on a host.
    pub fn on(&self, host: u32) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(host)].map(str::to_owned).to_vec()
    }

    /// From now on these are the names that processes of a host can look up: those that start, and those that did since it was given
    /// any.
    pub fn names(&self, host: u32, names: &[(&str, String)]) {
        let lines = names.iter().map(|(name, address)| format!("{address} {name}\n"));
        let text: String = ["127.0.0.1 localhost\n".to_owned()].into_iter().chain(lines).collect();
        let folder = self.etc(host);
        std::fs::create_dir_all(&folder).expect("who may make namespaces may name hosts");
        // In place: this very file lies over /etc/hosts for whom `ip netns exec` started.
        std::fs::write(folder.join("hosts"), text).expect("the folder is ours");
    }

    /// What of /etc is a host's own.
    fn etc(&self, host: u32) -> PathBuf {
        PathBuf::from("/etc/netns").join(self.space(host))
    }

    /// Pulls the cables of a host: from now on what is sent to it or by it is lost without a word.
    pub fn cut(&self, host: u32) {
        self.set_cables(host, "down");
    }

    /// Puts the cables back.
    pub fn mend(&self, host: u32) {
        self.set_cables(host, "up");
    }

    /// From now on what one host sends to another by the first switch is lost without a word; what the other sends to it arrives.
    pub fn drop_way(&self, from: u32, to: u32) {
        // A card that nobody has: the switch knows no way to it.
        let (space, address) = (self.space(from), self.address(to));
        ip(&format!(
            "-n {space} neighbour replace {address} lladdr 02:00:00:00:00:01 dev net0 nud permanent"
        ))
        .expect("the host is ours");
    }

    /// What it sends arrives again.
    pub fn mend_way(&self, from: u32, to: u32) {
        let (space, address) = (self.space(from), self.address(to));
        ip(&format!("-n {space} neighbour delete {address} dev net0")).expect("the host is ours");
    }

    /// From now on the busiest of the connections between two hosts loses all that is sent on it, both ways and without a word;
    /// what they send one another on others arrives. So it is where packets are dealt out to several links, and one of them is
    /// broken.
    ///
    /// # Errors
    /// In words, where `tc` or the kernel cannot do so, before anything was changed; and where there is no connection.
    pub fn drop_connection(&self, one: u32, other: u32) -> Result<(), String> {
        for host in [one, other] {
            let tc = format!("netns exec {} tc", self.space(host));
            ip(&format!("{tc} qdisc replace dev net0 root handle 1: htb default 1"))?;
            for class in ["1:1", "1:2"] {
                ip(&format!(
                    "{tc} class replace dev net0 parent 1: classid {class} htb rate 10gbit quantum 60000"
                ))?;
            }
            // A queue with room for nothing.
            ip(&format!("{tc} qdisc replace dev net0 parent 1:2 handle 2: bfifo limit 0"))?;
        }
        let filter = format!("netns exec {} ss -Htin dst {}", self.space(one), self.address(other));
        let told = ip(&filter)?;
        let (here, there) = busiest(&told).ok_or_else(|| format!("no connection is in\n{told}"))?;
        for (host, from, to) in [(one, here, there), (other, there, here)] {
            let matches = format!("match ip sport {from} 0xffff match ip dport {to} 0xffff");
            let tc = format!("netns exec {} tc", self.space(host));
            ip(&format!("{tc} filter add dev net0 parent 1: protocol ip u32 {matches} flowid 1:2"))?;
        }
        Ok(())
    }

    fn set_cables(&self, host: u32, state: &str) {
        for at in 0..self.switches {
            let cable = cable(host, at);
            ip(&format!("-n {} link set {cable} {state}", self.switch())).expect("the switch is ours");
        }
    }
}

impl Drop for Network {
    /// What was sent away with it ends with its last process.
    fn drop(&mut self) {
        for space in (0..self.hosts).map(|host| self.space(host)).chain([self.switch()]) {
            let _ = ip(&format!("netns delete {space}"));
        }
        for host in 0..self.hosts {
            let _ = std::fs::remove_dir_all(self.etc(host));
        }
    }
}
