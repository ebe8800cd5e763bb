package ext4

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// TestMetadataRanges holds what is told against dumpe2fs' words.
func TestMetadataRanges(t *testing.T) {
	img := filepath.Join(t.TempDir(), "img")
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", img, "300M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v %s", err, out)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := MetadataRanges(f, 300<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Check(300 << 20); err != nil {
		t.Fatal(err)
	}
	has := func(block int64) bool {
		for _, e := range m {
			if e.Off <= block*4096 && block*4096 < e.End() {
				return true
			}
		}
		return false
	}
	out, err := exec.Command("dumpe2fs", img).Output()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, x := range regexp.MustCompile(`(?:Primary superblock|Inode bitmap) at (\d+)`).FindAllSubmatch(out, -1) {
		block, err := strconv.ParseInt(string(x[1]), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if n++; !has(block) && n < 3 { // later groups' inodes are not initialised
			t.Errorf("%s is not told: %v", x[0], m)
		}
	}
	if n < 3 || m.Bytes() > 3<<20 || !has(0) || !has(1) {
		t.Errorf("%d found, %d bytes are told: %v", n, m.Bytes(), m)
	}
}

// TestMetadataRangesOfAnything: nothing a superblock says does harm.
func TestMetadataRangesOfAnything(t *testing.T) {
	img := filepath.Join(t.TempDir(), "img")
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", img, "8M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v %s", err, out)
	}
	good, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 20_000 {
		b := bytes.Clone(good[:16<<10])
		for range 1 + r.IntN(4) {
			b[1024+r.IntN(len(b)-1024)] = byte(r.Uint32())
		}
		size := int64(len(b))
		m, err := MetadataRanges(bytes.NewReader(b), size)
		if err == nil && len(m) > 0 {
			if err := m.Check(size + 8<<20); err != nil {
				t.Fatal(err)
			}
		}
	}
	if m, err := MetadataRanges(bytes.NewReader(make([]byte, 1<<20)), 1<<20); m != nil || err != nil {
		t.Errorf("nothing: %v, %v", m, err)
	}
}
