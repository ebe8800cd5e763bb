package nbd

import "testing"

// TestBuffers: memory is as long as was asked for and begins a page, also the
// second time; what is too large to be kept is not.
func TestBuffers(t *testing.T) {
	var b buffers
	for range 2 {
		for _, n := range []int{0, 1, 4095, 4096, 4097, 64 << 10, 1<<20 - 1, 1 << 20, 1<<20 + 1, 5 << 20} {
			p := b.get(n)
			if len(p) != n {
				t.Errorf("%d bytes were asked for, %d given", n, len(p))
			}
			if n > 0 && addressOf(p)%4096 != 0 {
				t.Errorf("%d bytes do not begin a page", n)
			}
			for i := range p {
				p[i] = 1
			}
			b.put(p)
		}
	}
	b.put(nil)
	b.put(make([]byte, 5000))
	if p := b.get(5000); len(p) != 5000 || cap(p) != 8192 {
		t.Errorf("%d bytes of %d are given for 5000", len(p), cap(p))
	}
	if !raced && testing.AllocsPerRun(100, func() { b.put(b.get(64 << 10)) }) > 2 {
		t.Error("memory that was taken back is not given again")
	}
}

// TestWeight: what a request is charged is what its memory takes, so that no more of
// them are under way, or wait, than there is memory for.
func TestWeight(t *testing.T) {
	for _, n := range []uint32{1, 512, 4096, 4097, 520 << 10, 1 << 20, 1<<20 + 1, MaxRequest} {
		for _, command := range []uint16{cmdRead, cmdWrite, cmdCache} {
			r := request{command: command, length: n}
			var b buffers
			p := b.get(int(n))
			if command == cmdCache {
				p = b.get(min(int(n), cacheBytes))
			}
			if least := int64(cap(p)) + page; r.weight() < least || r.weight() > least+page {
				t.Errorf("command %d of %d bytes is charged %d, and holds %d", command, n, r.weight(), least)
			}
		}
	}
	// Writes of a byte that wait for a store.
	const limit, each = 256 << 10, 1<<minKept + page
	q := newQueue(64, limit)
	for range limit / each {
		if err := q.admit(t.Context(), request{command: cmdWrite, length: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if q.writes.TryAcquire(1) {
		t.Errorf("%d writes hold %d bytes each, and there is room for more", limit/each, each)
	}
}
