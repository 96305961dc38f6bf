//! Tables of aligned text.

/// Rows of cells: the first `left` columns go to the left, the others to the right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of which the first `left` columns are text.
    pub fn new(left: usize) -> Self {
        Self { left, rows: Vec::new() }
    }

    /// Adds a row; rows may have different lengths.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self
    }

    /// The text: two spaces between columns, none at the ends of lines, each line with its newline.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if column < self.left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_letters() {
        let mut table = Table::new(1);
        table.row(["stage", "steps", "β → γ"]).row(["warmup", "32", "0.1"]).row(["total", "1 000"]);
        assert_eq!(table.render(), "stage   steps  β → γ\nwarmup     32    0.1\ntotal   1 000\n");
        assert_eq!(Table::new(3).render(), "");
    }
}
