package lazyroot

// Local tells whether a request of n bytes at off needs nothing but the disk:
// then it waits for no store. What is so stays so. A write replaces all blocks
// but those at its ends, of which it may have a part; for a read all must be here.
func (d *Device) Local(off, n int64, write bool) bool {
	if d.disk == nil || off < 0 || n < 0 || off > d.size-n {
		return false
	}
	from, to := off/Block, (off+n+Block-1)/Block
	if !write {
		return d.bits.all(from, to)
	}
	end := off + n
	return (off%Block == 0 || d.bits.has(from)) && (end%Block == 0 || d.bits.has(to-1))
}
