package dm

import (
	"encoding/binary"
	"slices"
	"testing"
)

// TestTable encodes tables as dm-ioctl.h has them, and reads back what a kernel
// would say of them.
func TestTable(t *testing.T) {
	for _, c := range []struct {
		name  string
		table []Linear
		bad   bool
	}{
		{name: "one", table: []Linear{{0, 1 << 30, Device{43, 0}, 0}}},
		{name: "two", table: []Linear{{0, 4096, Device{254, 16}, 1 << 20}, {4096, 512, Device{259, 1048575}, 512}}},
		{name: "none", bad: true},
		{name: "gap", table: []Linear{{0, 512, Device{1, 1}, 0}, {1024, 512, Device{1, 1}, 0}}, bad: true},
		{name: "not from the start", table: []Linear{{512, 512, Device{1, 1}, 0}}, bad: true},
		{name: "no sector", table: []Linear{{0, 513, Device{1, 1}, 0}}, bad: true},
		{name: "empty", table: []Linear{{0, 0, Device{1, 1}, 0}}, bad: true},
		{name: "before the start", table: []Linear{{0, 512, Device{1, 1}, -512}}, bad: true},
	} {
		data, err := encode(c.table)
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil {
			continue
		}
		// The kernel counts from the first specification on.
		for at, n := 0, 0; n < len(c.table); n++ {
			next := at + int(binary.NativeEndian.Uint32(data[at+20:]))
			binary.NativeEndian.PutUint32(data[at+20:], uint32(next))
			at = next
		}
		got, err := decode(data, len(c.table))
		if err != nil || !slices.Equal(got, c.table) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
		if _, err := decode(data[:len(data)-8], len(c.table)); err == nil {
			t.Errorf("%s: a table that is cut short is read", c.name)
		}
	}
}

// FuzzTable reads tables that no kernel gives.
func FuzzTable(f *testing.F) {
	data, err := encode([]Linear{{0, 4096, Device{254, 16}, 1 << 20}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, 1)
	f.Fuzz(func(t *testing.T, data []byte, n int) {
		table, err := decode(data, min(n, 64))
		if err == nil && len(table) != max(0, min(n, 64)) {
			t.Errorf("%d of %d targets", len(table), n)
		}
	})
}
