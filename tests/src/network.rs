//! Hosts of a network of their own: network namespaces on one switch, whose cables can be pulled.

use std::process::Command;

/// Hosts that reach one another, and nothing else, over a switch of their own.
#[derive(Debug)]
pub struct Network {
    name: String,
    hosts: u32,
}

/// `ip WORDS`; the error is what it says.
fn ip(words: &str) -> Result<(), String> {
    let done = Command::new("ip").args(words.split(' ')).output().map_err(|cause| format!("ip: {cause}"))?;
    let told = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    if done.status.success() { Ok(()) } else { Err(format!("ip {words}: {told}")) }
}

impl Network {
    /// A network of `hosts`, or why this user may not make one here.
    ///
    /// # Errors
    /// In words, when `ip` is missing or the kernel refuses.
    pub fn new(name: &str, hosts: u32) -> Result<Self, String> {
        let name = format!("anello-{}-{name}", std::process::id());
        let network = Self { name, hosts };
        network.make()?;
        Ok(network)
    }

    fn make(&self) -> Result<(), String> {
        let switch = self.switch();
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add switch type bridge"))?;
        ip(&format!("-n {switch} link set switch up"))?;
        for host in 0..self.hosts {
            let (space, address) = (self.space(host), self.address(host));
            ip(&format!("netns add {space}"))?;
            ip(&format!("-n {space} link add net type veth peer name cable{host} netns {switch}"))?;
            ip(&format!("-n {space} address add {address}/24 dev net"))?;
            ip(&format!("-n {space} link set lo up"))?;
            ip(&format!("-n {space} link set net up"))?;
            ip(&format!("-n {switch} link set cable{host} master switch up"))?;
        }
        Ok(())
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn space(&self, host: u32) -> String {
        format!("{}-{host}", self.name)
    }

    /// The address of a host.
    pub fn address(&self, host: u32) -> String {
        format!("10.213.7.{}", host + 1)
    }

    /// What a command line begins with that is to run on a host.
    pub fn on(&self, host: u32) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(host)].map(str::to_owned).to_vec()
    }

    /// Pulls the cable of a host: from now on what is sent to it or by it is lost without a word.
    pub fn cut(&self, host: u32) {
        self.cable(host, "down");
    }

    /// Puts the cable back.
    pub fn mend(&self, host: u32) {
        self.cable(host, "up");
    }

    /// From now on what one host sends to another is lost without a word; what the other sends to it arrives.
    pub fn drop_way(&self, from: u32, to: u32) {
        // A card that nobody has: the switch knows no way to it.
        let (space, address) = (self.space(from), self.address(to));
        ip(&format!("-n {space} neighbour replace {address} lladdr 02:00:00:00:00:01 dev net nud permanent"))
            .expect("the host is ours");
    }

    /// What it sends arrives again.
    pub fn mend_way(&self, from: u32, to: u32) {
        let (space, address) = (self.space(from), self.address(to));
        ip(&format!("-n {space} neighbour delete {address} dev net")).expect("the host is ours");
    }

    fn cable(&self, host: u32, state: &str) {
        ip(&format!("-n {} link set cable{host} {state}", self.switch())).expect("the switch is ours");
    }
}

impl Drop for Network {
    /// What was sent away with it ends with its last process.
    fn drop(&mut self) {
        for space in (0..self.hosts).map(|host| self.space(host)).chain([self.switch()]) {
            let _ = ip(&format!("netns delete {space}"));
        }
    }
}
