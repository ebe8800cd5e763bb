package boot

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/sparse"
)

// tableOf is a disk of a kind with a filesystem of 4 MiB in it, and where that is.
func tableOf(t testing.TB, kind disk.Kind) (data []byte, off, size int64) {
	t.Helper()
	const fs = 4 << 20
	m := sparse.Map{}.Append(sparse.Extent{Off: 0, Len: fs})
	d, err := disk.Wrap(kind, fs, m, [16]byte{1})
	check(t, err)
	var b bytes.Buffer
	check(t, d.Write(context.Background(), &b, func(w io.Writer) error {
		_, err := w.Write(bytes.Repeat([]byte{'x'}, fs))
		return err
	}))
	data = make([]byte, d.Size())
	at := 0
	for _, e := range d.Map() {
		at += copy(data[e.Off:e.Off+e.Len], b.Bytes()[at:])
	}
	off, size = d.Partition()
	return data, off, size
}

func TestPartitions(t *testing.T) {
	for _, kind := range []disk.Kind{disk.MBR, disk.GPT} {
		data, off, size := tableOf(t, kind)
		list, err := readPartitions(bytes.NewReader(data), int64(len(data)))
		if err != nil || len(list) == 0 || list[0].Number != 1 || list[0].Start != off || list[0].Length != size || len(list[0].UUID) < 11 {
			t.Errorf("%s: %+v, %v; want %d bytes at %d", kind, list, err, size, off)
		}
		if kind == disk.GPT && (len(list) != 2 || list[1].Number != 128) {
			t.Errorf("GPT: %+v", list)
		}
		if _, err := readPartitions(bytes.NewReader(data), off+size-1); err == nil || !strings.Contains(err.Error(), "is not on the disk") {
			t.Errorf("%s: on a shorter disk: %v", kind, err)
		}
		for _, at := range []int{530, 1030} {
			bad := bytes.Clone(data)
			bad[at] ^= 1
			if _, err := readPartitions(bytes.NewReader(bad), int64(len(bad))); kind == disk.GPT && (err == nil || !strings.Contains(err.Error(), "checksum")) {
				t.Errorf("%s: changed at %d: %v", kind, at, err)
			}
		}
	}
	extended, _, _ := tableOf(t, disk.MBR)
	extended[446+4] = 0x05
	for _, c := range []struct {
		want string
		data []byte
	}{
		{"no MBR or GPT", make([]byte, 4096)},
		{"logical partitions are not supported", extended},
		{"it has no partition", append(make([]byte, 510), append([]byte{0x55, 0xaa}, make([]byte, 4096)...)...)},
	} {
		if _, err := readPartitions(bytes.NewReader(c.data), int64(len(c.data))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// FuzzPartitions reads any bytes as a partition table: all that comes out is on
// the disk.
func FuzzPartitions(f *testing.F) {
	for _, kind := range []disk.Kind{disk.MBR, disk.GPT} {
		data, _, _ := tableOf(f, kind)
		f.Add(data[:20<<10], int64(len(data)))
	}
	f.Fuzz(func(t *testing.T, data []byte, size int64) {
		list, err := readPartitions(bytes.NewReader(data), size)
		for _, p := range list {
			if err != nil || p.Start <= 0 || p.Length <= 0 || p.Start+p.Length > size || p.Number < 1 || p.Number > 128 {
				t.Errorf("%+v of %d bytes, %v", p, size, err)
			}
		}
	})
}

// TestRules are what udev is told of the devices below a root.
func TestRules(t *testing.T) {
	l := &lazyRoot{disk: device{Name: "vda"}, parts: []partition{
		{Number: 1, UUID: "0f1e-01", Label: "root"}, {Number: 2, Label: `x", RUN+="/bin/sh`},
	}}
	got := l.rules()
	for _, want := range []string{
		`KERNEL=="nbd0|vda|vda[0-9]*|vdap[0-9]*", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", ENV{SYSTEMD_READY}="0"`,
		`ATTR{dm/name}=="instar-root1", SYMLINK+="disk/by-partuuid/0f1e-01"`,
		`ATTR{dm/name}=="instar-root1", SYMLINK+="disk/by-partlabel/root"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the rules lack %s:\n%s", want, got)
		}
	}
	if strings.Contains(got, "RUN") {
		t.Errorf("a label became a rule:\n%s", got)
	}
}
