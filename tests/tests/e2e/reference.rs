//! `docs/commands.md`: what every command says of itself.

use std::path::Path;

use anello_tests::anello;

const HEAD: &str = "\
# Commands

What `anello help` says, of every command; a test compares. The exit codes are those of `anello help` itself.
";

/// What a command says of itself, then all below it.
fn tell(page: &mut String, path: &[&str]) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let help = anello(folder, &[path, &["--help"]].concat()).expect(0);
    let name = [&["anello"], path].concat().join(" ");
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    *page += &format!("\n## {name}\n```text\n{}\n```\n", lines.join("\n").trim());
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A name stands two letters in; what goes on below a name stands further in.
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    for name in names.filter(|name| !name.is_empty() && *name != "help") {
        tell(page, &[path, &[name]].concat());
    }
}

#[test]
fn the_page_of_commands_is_that_of_this_build() {
    let mut page = HEAD.to_owned();
    tell(&mut page, &[]);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/commands.md");
    if std::env::var_os("ANELLO_UPDATE").is_some() {
        std::fs::write(file, &page).expect("the page can be written");
    }
    let written = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        written == page,
        "{file} is old; write it anew: ANELLO_UPDATE=1 cargo test -p anello-tests --test e2e reference"
    );
}
