package ext4_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// some makes a tree with a bit of everything that takes blocks.
func some(t testing.TB) *filetree.Tree {
	t.Helper()
	sizes, maps := map[string]int64{}, map[string]sparse.Map{}
	for i := range 400 {
		sizes[fmt.Sprintf("%d%s", i, strings.Repeat("-", i%200))] = int64(i * 100)
	}
	sizes["sparse"] = 10 * gib
	for i := range int64(1000) {
		maps["sparse"] = maps["sparse"].Append(sparse.Extent{Off: i * 10 * mib, Len: 4096})
	}
	return files(t, sizes, maps)
}

// Filesystems of all sizes around the boundaries of groups are clean, can be
// written to until they are full, and grow.
func TestSizes(t *testing.T) {
	tree := some(t)
	src := &memSource{t: tree}
	for _, size := range []int64{
		24 * mib, 24*mib + 4096, 100*mib + 1, 127 * mib, 128*mib - 4096, 128 * mib, 128*mib + 4096, 129 * mib, 130 * mib, 138 * mib, 148 * mib,
		256 * mib, 3*128*mib + mib, 512 * mib, gib, 10 * gib, 26 * 128 * mib, 26*128*mib + 60*mib, 300 * gib, 2<<40 + 128*mib,
	} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := plan(t, tree, ext4.Options{Size: size})
			if p.Size() != size {
				t.Errorf("size %d", p.Size())
			}
			img := image(t, p, src, func(c ext4.Change) { t.Error(c.String()) })
			fsck(t, img)
			dir := mount(t, img)
			check(t, os.MkdirAll(filepath.Join(dir, "new/dir"), 0o755))
			check(t, os.WriteFile(filepath.Join(dir, "new/dir/file"), bytes.Repeat([]byte("n"), mib), 0o644))
			check(t, os.RemoveAll(filepath.Join(dir, "d/sparse")))
			if size < 300*mib {
				f, err := os.Create(filepath.Join(dir, "fill"))
				check(t, err)
				for err == nil {
					_, err = f.Write(make([]byte, mib))
				}
				if !errors.Is(err, unix.ENOSPC) {
					t.Error(err)
				}
				check(t, f.Close())
			}
			check(t, unix.Unmount(dir, 0))
			fsck(t, img)
			compareFiles(t, tree, img)
		})
	}
}

// compareFiles checks the small files of some.
func compareFiles(t *testing.T, tree *filetree.Tree, img string) {
	t.Helper()
	dir := mount(t, img)
	for name, id := range tree.Children(tree.Find("d")) {
		if string(name) == "sparse" {
			continue
		}
		want := make([]byte, tree.Size(id))
		content(id, tree.Data(id), want, 0)
		if got, err := os.ReadFile(filepath.Join(dir, "d", string(name))); !bytes.Equal(got, want) {
			t.Errorf("%s differs (%v)", name, err)
		}
	}
	check(t, unix.Unmount(dir, 0))
}

// The filesystem grows, and shrinks, by resize2fs, and mounted by the kernel,
// which permits that only to who has CAP_SYS_RESOURCE.
func TestGrow(t *testing.T) {
	tree := some(t)
	for _, tt := range []struct {
		from, to string
		mounted  bool
	}{
		{"64M", "200M", false},
		{"64M", "5G", false},
		{"1G", "70G", false},
		{"500M", "60M", false},
		{"64M", "200M", true},
		{"64M", "5G", true},
		{"1G", "70G", true},
		{"130M", "100G", true},
		{"10G", "1T", true},
	} {
		t.Run(fmt.Sprintf("%s to %s mounted=%v", tt.from, tt.to, tt.mounted), func(t *testing.T) {
			p := plan(t, tree, ext4.Options{Size: bytesOf(tt.from)})
			img := image(t, p, &memSource{t: tree}, nil)
			if tt.mounted && mayGrow(t) {
				check(t, os.Truncate(img, bytesOf(tt.to)))
				dir := mount(t, img)
				run(t, "resize2fs", strings.TrimSpace(run(t, "findmnt", "-no", "SOURCE", dir)))
				check(t, os.WriteFile(filepath.Join(dir, "after"), make([]byte, 10*mib), 0o644))
				check(t, unix.Unmount(dir, 0))
			} else {
				run(t, "resize2fs", "-f", img, tt.to)
			}
			fsck(t, img)
			if n := dumpe2fs(t, img)["Block count"]; n != fmt.Sprint(bytesOf(tt.to)/4096) {
				t.Errorf("%s blocks", n)
			}
			compareFiles(t, tree, img)
		})
	}
}

func mayGrow(t *testing.T) bool {
	t.Helper()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	check(t, unix.Capget(&h, &d[0]))
	return d[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func bytesOf(s string) int64 {
	var n int64
	var unit rune
	fmt.Sscanf(s, "%d%c", &n, &unit)
	return n << map[rune]int{'M': 20, 'G': 30, 'T': 40}[unit]
}

var field = regexp.MustCompile(`(?m)^([A-Z][^:\n]+):\s+(.*)$`)

func dumpe2fs(t testing.TB, img string) map[string]string {
	t.Helper()
	m := map[string]string{}
	for _, f := range field.FindAllStringSubmatch(run(t, "dumpe2fs", "-h", img), -1) {
		m[f[1]] = f[2]
	}
	return m
}

func TestSuperblock(t *testing.T) {
	tree := some(t)
	p := plan(t, tree, ext4.Options{Size: 10 * gib, Label: "sixteen bytes ok", UUID: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, Created: 1_234_567_890})
	img := image(t, p, &memSource{t: tree}, nil)
	// mke2fs is the yardstick.
	other := filepath.Join(t.TempDir(), "mke2fs")
	run(t, "mke2fs", "-q", "-t", "ext4", "-O", "^orphan_file,^metadata_csum_seed", "-b", "4096", "-U", "01020304-0506-0708-090a-0b0c0d0e0f10", "-L", "sixteen bytes ok", other, "10G")
	got, want := dumpe2fs(t, img), dumpe2fs(t, other)
	total, used := p.Inodes()
	if got["Inode count"] != fmt.Sprint(total) || got["Free inodes"] != fmt.Sprint(total-used) || got["Free blocks"] != fmt.Sprint(p.Free()/4096) {
		t.Errorf("%d inodes, %d used, %d bytes free, but %v", total, used, p.Free(), got)
	}
	for _, k := range []string{"Filesystem created", "Last write time", "Last checked"} {
		if v := got[k]; v != "Fri Feb 13 23:31:30 2009" {
			t.Errorf("%s: %s", k, v)
		}
		delete(want, k)
	}
	for _, k := range []string{
		"Free blocks", "Free inodes", "Lifetime writes", "Directory Hash Seed", "Checksum", "Journal checksum type", "Overhead clusters", "Filesystem flags",
	} {
		delete(want, k) // of the content, or kept by the kernel
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %s, mke2fs has %s", k, got[k], v)
		}
	}
	for _, f := range []string{"has_journal ext_attr resize_inode dir_index filetype extent 64bit flex_bg sparse_super large_file huge_file dir_nlink extra_isize metadata_csum"} {
		if got["Filesystem features"] != f {
			t.Errorf("features: %s", got["Filesystem features"])
		}
	}
	if out := run(t, "debugfs", "-R", "lsdel", img); !strings.Contains(out, "0 deleted inodes found") {
		t.Error(out)
	}
	if out := run(t, "tune2fs", "-l", img); !strings.Contains(out, "clean") {
		t.Error(out)
	}
	groups := run(t, "dumpe2fs", img)
	if n, m := strings.Count(groups, "\nGroup ")-1, strings.Count(groups, "ITABLE_ZEROED]"); n != 80 || m != n {
		t.Errorf("%d groups, %d of them leave nothing to do for ext4lazyinit", n, m)
	}
	// A copy of the superblock serves as well as the first.
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	check(t, err)
	_, err = f.WriteAt(make([]byte, 8192), 0)
	check(t, err)
	check(t, f.Close())
	run(t, "sh", "-c", `e2fsck -fy -b 32768 "$0"; test $? -le 1`, img)
	fsck(t, img)
}

func TestDeterministic(t *testing.T) {
	var sums [3][32]byte
	var uuids [3][16]byte
	for i := range sums {
		o := ext4.Options{}
		if i == 2 {
			o.Label = "other"
		}
		tree := some(t)
		p := plan(t, tree, o)
		h := sha256.New()
		check(t, p.Write(t.Context(), h, &memSource{t: tree}, nil))
		h.Sum(sums[i][:0])
		uuids[i] = p.UUID()
	}
	if sums[0] != sums[1] || uuids[0] != uuids[1] {
		t.Error("two runs differ")
	}
	if uuids[2] == uuids[0] {
		t.Error("other options, same UUID")
	}
}

// TestGolden pins the bytes: EC2 bundles of one machine are to be comparable
// from one version of Instar to the next.
func TestGolden(t *testing.T) {
	for _, tt := range []struct {
		size int64
		want string
	}{
		{0, "680c197f7a26a694cf60e80a863f102602cb6a009869cf69186f92dc4fbf43ca"},
		{gib, "fbb3b48ea6b7b67eb5ee5f6910d6d2e96bd2b6993bc7b680eaea35e218ddf6f6"},
		{30 * gib, "afa8c284c492a0a73658aaf803b3bca60b85dd16171aa66d5f09a14bc3c025d9"},
	} {
		tree := some(t)
		h := sha256.New()
		check(t, plan(t, tree, ext4.Options{Size: tt.size}).Write(t.Context(), h, &memSource{t: tree}, nil))
		if got := fmt.Sprintf("%x", h.Sum(nil)); got != tt.want {
			t.Errorf("size %d: the image's digest is %s, was %s", tt.size, got, tt.want)
		}
	}
}

// Segments name what the stream carries.
func TestSegments(t *testing.T) {
	tree := some(t)
	p := plan(t, tree, ext4.Options{Size: gib})
	img, err := os.Open(image(t, p, &memSource{t: tree}, nil))
	check(t, err)
	defer img.Close()
	var at, data int64
	kinds := map[ext4.Kind]bool{}
	for s := range p.Segments() {
		if s.Pos < at || s.Len <= 0 || s.Len%4096 != 0 {
			t.Fatalf("%+v after %d", s, at)
		}
		at = s.Pos + s.Len
		kinds[s.Kind] = true
		if s.Kind != ext4.KindData {
			continue
		}
		data += s.Len
		want, got := make([]byte, s.Len), make([]byte, s.Len)
		content(s.ID, tree.Data(s.ID), want, s.Off)
		_, err := img.ReadAt(got, s.Pos)
		check(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%+v: other data", s)
		}
	}
	if data < 1000*4096 || len(kinds) < 10 {
		t.Errorf("%d bytes of data, kinds %v", data, kinds)
	}
	var files []ext4.Segment
	for s := range p.Segments() {
		if s.Kind == ext4.KindData {
			files = append(files, s)
		}
	}
	if got := slices.Collect(p.Data()); !slices.Equal(got, files) {
		t.Errorf("data segments %v, want %v", got, files)
	}
	for range p.Segments() { // may be left early
		break
	}
}

func TestTooSmall(t *testing.T) {
	tree := files(t, map[string]int64{"a": 100 * mib, "b": 50 * mib}, nil)
	_, err := ext4.NewPlan(tree, ext4.Options{Size: 120 * mib})
	var small *ext4.TooSmallError
	if !errors.As(err, &small) || small.Have != 120*mib || small.Need < 150*mib || small.Need > 180*mib {
		t.Fatal(err)
	}
	p := plan(t, tree, ext4.Options{Size: small.Need})
	img := image(t, p, &memSource{t: tree}, nil)
	fsck(t, img)
	dir := mount(t, img)
	f, err := os.Create(filepath.Join(dir, "one more"))
	check(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 1<<16))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	check(t, f.Close())
	check(t, unix.Unmount(dir, 0))
	fsck(t, img)
	if _, err := ext4.NewPlan(tree, ext4.Options{Size: small.Need - mib}); !errors.As(err, &small) {
		t.Errorf("one MiB less than needed: %v", err)
	}
	for _, o := range []ext4.Options{
		{Label: strings.Repeat("l", 17)}, {ReservedPercent: 51}, {JournalBlocks: 1023}, {Size: -1}, {Inodes: 12}, {Inodes: 1<<31 + 1},
	} {
		if _, err := ext4.NewPlan(tree, o); !errors.Is(err, ext4.ErrOptions) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := ext4.NewPlan(tree, ext4.Options{Size: 1 << 50}); !errors.Is(err, ext4.ErrTooLarge) {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	tree := files(t, map[string]int64{"a": 10 * mib}, nil)
	for _, tt := range []struct {
		o    ext4.Options
		want map[string]string
	}{
		{ext4.Options{Size: gib, ReservedPercent: 1}, map[string]string{"Reserved block count": "2621"}},
		{ext4.Options{Size: gib, ReservedPercent: -1}, map[string]string{"Reserved block count": "0"}},
		{ext4.Options{Size: gib, JournalBlocks: 2000}, map[string]string{"Total journal blocks": "2000"}},
		{ext4.Options{Size: 300 * gib, JournalBlocks: 1_000_000}, map[string]string{"Total journal blocks": "1000000"}},
		{ext4.Options{Size: gib, Inodes: 500}, map[string]string{"Inode count": "512"}},
		{ext4.Options{Size: gib, Inodes: 200_000}, map[string]string{"Inode count": "200064"}},
	} {
		img := image(t, plan(t, tree, tt.o), &memSource{t: tree}, nil)
		fsck(t, img)
		got := dumpe2fs(t, img)
		for k, v := range tt.want {
			if got[k] != v {
				t.Errorf("%+v: %s is %s, not %s", tt.o, k, got[k], v)
			}
		}
	}
}

// The plan of a huge image is quick and small; only its consistency can be
// checked here, for the file to hold it would be too large.
func TestHuge(t *testing.T) {
	tree := files(t, map[string]int64{"a": 3 << 40, "b": 10 << 40, "c": 1}, map[string]sparse.Map{"a": nil, "b": {{Off: 9 << 40, Len: 1}}})
	for _, size := range []int64{4 << 40, 16<<40 - 4096, 17 << 40, 64 << 40, 128 << 40} {
		p := plan(t, tree, ext4.Options{Size: size})
		check(t, p.Map().Check(size))
		if n := len(p.Map()); n > 1000 {
			t.Errorf("%d TiB: %d runs", size>>40, n)
		}
		if free := p.Free(); free < size-3<<40-size/20 || free > size-3<<40 {
			t.Errorf("%d TiB: %d GiB free", size>>40, free>>30)
		}
	}
}
