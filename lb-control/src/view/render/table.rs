//! A table of aligned columns without lines, as kubectl writes them.

use std::io::Write;

/// Collects rows and aligns them.
pub(super) struct Table {
    writer: tabwriter::TabWriter<Vec<u8>>,
}

impl Table {
    /// A table with a header.
    pub(super) fn new(header: &[&str]) -> Self {
        let mut table = Self { writer: tabwriter::TabWriter::new(Vec::new()).padding(3).minwidth(0) };
        table.write(header.iter().copied());
        table
    }

    /// Adds a row; an empty cell is shown as `-`, so that columns can be cut by machines.
    pub(super) fn row(&mut self, cells: &[String]) {
        self.write(cells.iter().map(|cell| if cell.is_empty() { "-" } else { cell }));
    }

    fn write<'a>(&mut self, cells: impl Iterator<Item = &'a str>) {
        let clean: Vec<String> = cells.map(one_line).collect();
        // Writing to memory cannot fail.
        let _ = writeln!(self.writer, "{}", clean.join("\t"));
    }

    /// The aligned text.
    pub(super) fn finish(self) -> String {
        let bytes = self.writer.into_inner().map_err(|error| error.to_string()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Text from elsewhere must neither break a line nor command the terminal.
pub(super) fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_and_marks_empty_cells() {
        let mut table = Table::new(&["A", "LONGER", "C"]);
        table.row(&["wide cell".into(), String::new(), "x\ty".into()]);
        assert_eq!(table.finish(), "A           LONGER   C\nwide cell   -        x y\n");
    }
}
