//! Writing tables: large parts of them may be zero, and zeros need no space in a new file.

use imgtool_toolkit::{Output, Result, zero};

/// Writes a table at `offset`.
pub fn write_table(output: &Output, table: &[u8], offset: u64) -> Result<()> {
    let mut runs = Vec::new();
    zero::push_nonzero_runs(table, 0..table.len(), zero::ZERO_GRANULARITY, &mut runs);
    let mut done = 0;
    for run in runs {
        output.write_zeros_at(offset + done as u64, (run.start - done) as u64)?;
        output.write_at(&table[run.clone()], offset + run.start as u64)?;
        done = run.end;
    }
    output.write_zeros_at(offset + done as u64, (table.len() - done) as u64)
}
