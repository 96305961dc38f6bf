//! Where lanes are in their data, as workers tell one another: a name of a source is said once, not once a lane.

use std::collections::BTreeSet;

use anello_proto::v1;
use anello_store::{Cursor, OpenDocument, SourceCursor};

/// `cursors`, in their order.
pub(super) fn packed(cursors: &[Cursor]) -> v1::Cursors {
    // Each step says it: names are compared, and those that are said are copied.
    let names: BTreeSet<&String> = cursors
        .iter()
        .flat_map(|cursor| cursor.sources.keys().chain(cursor.open.iter().map(|open| &open.source)))
        .collect();
    let sources: Vec<String> = names.into_iter().cloned().collect();
    let index = |name: &String| sources.binary_search(name).expect("all names are there") as u32;
    let lane = |cursor: &Cursor| v1::LaneCursor {
        stage: cursor.stage,
        draws: cursor.draws,
        sources: cursor
            .sources
            .iter()
            .map(|(name, &SourceCursor { row_groups, documents })| v1::SourcePlace {
                source: index(name),
                row_groups,
                documents,
            })
            .collect(),
        open: cursor
            .open
            .as_ref()
            .map(|open| v1::OpenDocument { source: index(&open.source), token: open.token }),
    };
    let lanes = cursors.iter().map(lane).collect();
    v1::Cursors { sources, lanes }
}

/// The cursors that were packed; an error says what makes no sense.
pub(super) fn unpacked(said: v1::Cursors) -> Result<Vec<Cursor>, String> {
    let name = |index: u32| {
        let name = said.sources.get(index as usize).cloned();
        name.ok_or_else(|| format!("source {index}, of {} that are named", said.sources.len()))
    };
    let lane = |lane: v1::LaneCursor| {
        let v1::LaneCursor { stage, draws, sources, open } = lane;
        let place = |place: v1::SourcePlace| {
            let v1::SourcePlace { source, row_groups, documents } = place;
            Ok((name(source)?, SourceCursor { row_groups, documents }))
        };
        let sources = sources.into_iter().map(place).collect::<Result<_, String>>()?;
        let open =
            open.map(|open| Ok::<_, String>(OpenDocument { source: name(open.source)?, token: open.token }));
        Ok(Cursor { stage, draws, sources, open: open.transpose()? })
    };
    said.lanes.into_iter().map(lane).collect()
}
