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
