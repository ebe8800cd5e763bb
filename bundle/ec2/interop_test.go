package ec2

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/sparse"
)

// sh runs a shell script with strict settings in dir.
func sh(t *testing.T, dir, script string, env ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, stderr.String())
	}
	return string(out)
}

// A bundle of ours is opened and checked by openssl, gunzip and tar alone.
func TestOthersOpenOurs(t *testing.T) {
	big := patchwork(5_000_000, 11)
	holes := make([]byte, 9<<20+777)
	var many sparse.Map
	for off := int64(0); off < int64(len(holes)); off += 64 << 10 { // > 4 + 21 extents
		n := min(8192, int64(len(holes))-off)
		copy(holes[off:off+n], big[off/4:])
		many = append(many, sparse.Extent{Off: off, Len: n})
	}
	keyPath, err := filepath.Abs(fixture("keys", "user-pk.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		img  Image
		data []byte
		typ  string
	}{
		{"dense", memoryImage("dense.img", big, nil), big, "-"},
		{"sparse", memoryImage("sparse.img", holes, many), holes, "-"},
		{"few holes", memoryImage("few.img", append(make([]byte, 65536), big...), sparse.Map{{Off: 65536, Len: int64(len(big))}}), append(make([]byte, 65536), big...), "-"},
		{"only hole", memoryImage("hole.img", make([]byte, 1<<20), sparse.Map{}), make([]byte, 1<<20), "-"},
		{"long name", memoryImage(strings.Repeat("n", 150), big[:1000], nil), big[:1000], "-"},
		{"one byte", memoryImage("b", []byte{7}, nil), []byte{7}, "-"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			o := options(t)
			o.PartSize = 1 << 20
			store := renamingStore{newMemStore()}
			m, doc, err := Bundle(t.Context(), o, c.img, store)
			if err != nil {
				t.Fatal(err)
			}
			for name, b := range store.parts {
				if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for file, b := range map[string][]byte{
				"manifest": doc, "signed": rawSigned(doc), "signature": newForge(t).signatureOf(doc), "userkey": m.UserKey, "useriv": m.UserIV,
			} {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			digits := len(fmt.Sprint(len(m.Parts)))
			if want := fmt.Sprintf("%s.part.%0*d", c.img.Name, digits, 0); m.Parts[0].Filename != want {
				t.Errorf("first part is called %q, want %q", m.Parts[0].Filename, want)
			}
			// The parts in the order of a shell's glob are the parts in order.
			out := sh(t, dir, `
				xmllint --noout manifest
				openssl dgst -sha1 -verify <(openssl pkey -in "$PK" -pubout) -signature signature signed >&2
				key=$(openssl pkeyutl -decrypt -inkey "$PK" -in userkey); iv=$(openssl pkeyutl -decrypt -inkey "$PK" -in useriv)
				cat *.part.* | openssl enc -d -aes-128-cbc -K $key -iv $iv | gunzip > t.tar
				sha1sum < t.tar | cut -d' ' -f1
				mkdir out; tar -xSpf t.tar -C out --numeric-owner
				tar -tvf t.tar >&2; gzip -t < <(cat *.part.* | openssl enc -d -aes-128-cbc -K $key -iv $iv)
				`, "PK="+keyPath)
			if got := strings.TrimSpace(out); got != m.Digest.String() {
				t.Errorf("the archive's digest is %s, the manifest says %s", got, m.Digest)
			}
			path := filepath.Join(dir, "out", c.img.Name)
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, c.data) {
				t.Error("tar extracted another image")
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if c.img.Map != nil && st.Blocks*512 > c.img.Map.Bytes()+64<<10 {
				t.Errorf("extracted file takes %d bytes of disk for %d of data", st.Blocks*512, c.img.Map.Bytes())
			}
			if st.Mtim.Sec != 1700000000 || st.Mode&0o7777 != 0o644 {
				t.Errorf("extracted with mtime %d and mode %o", st.Mtim.Sec, st.Mode)
			}
			var sum int64
			for _, p := range m.Parts {
				sum += int64(len(store.parts[p.Filename]))
			}
			if sum != m.BundledSize {
				t.Errorf("parts have %d bytes, the manifest says %d", sum, m.BundledSize)
			}
		})
	}
}

// Bundles put together by a script are opened by us, in 20 shapes.
func TestWeOpenOthers(t *testing.T) {
	f := newForge(t)
	dir := t.TempDir()
	data := patchwork(1_500_000, 5)
	clear(data[200_000:900_000])
	holes, err := os.Create(filepath.Join(dir, "img"))
	if err != nil {
		t.Fatal(err)
	}
	w := sparse.NewWriter(holes)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if err := holes.Close(); err != nil {
		t.Fatal(err)
	}
	sh(t, dir, `cp --sparse=always img "$(printf 'n%.0s' {1..180})"; ln -s img link`)
	env := []string{"K=" + hex.EncodeToString(f.key[:]), "IV=" + hex.EncodeToString(f.iv[:])}
	for i, c := range []struct{ tar, gzip, split string }{
		{"tar -c -h -S --owner 0 --group 0 img", "gzip -9", "-b 100k"}, // ec2-bundle-image
		{"tar -c -h -S --owner 0 --group 0 link", "gzip -9", "-b 100k"},
		{"tar -c img", "gzip -6", "-b 64k"},
		{"tar -c img", "gzip -1", "-b 10m"},
		{"tar -c --format=gnu -S img", "pigz -c", "-b 100k"}, // euca-bundle-image
		{"tar -c --format=gnu img", "pigz -9 -c", "-b 100k"},
		{"tar -c --format=gnu img", "pigz -p 2 -i -c", "-b 100k"},
		{"tar -c --format=oldgnu -S img", "gzip -6", "-b 16k"},
		{"tar -c --format=ustar img", "gzip -6", "-b 100k"},
		{"tar -c --format=v7 img", "gzip -6", "-b 100k"},
		{"tar -c --format=pax img", "gzip -6", "-b 100k"},
		{"tar -c --format=pax -S img", "gzip -6", "-b 100k"},
		{"tar -c --format=pax -S --sparse-version=0.0 img", "gzip -6", "-b 100k"},
		{"tar -c --format=pax -S --sparse-version=0.1 img", "gzip -6", "-b 100k"},
		{"tar -c -S -b 1 img", "gzip -6", "-b 100k"},
		{"tar -c -S -b 200 img", "gzip -6", "-b 100k"},
		{"tar -c -S n*", "gzip -6", "-b 100k"},
		{"tar -c n*", "gzip -n -6", "-b 4097"}, // parts that are no multiple of 16
		{"tar -c -S --hole-detection=raw img", "gzip -6", "-b 100k"},
		{"python3 -c 'import tarfile,sys; t=tarfile.open(fileobj=sys.stdout.buffer, mode=\"w|\", format=tarfile.GNU_FORMAT); t.add(\"img\"); t.close()'", "gzip -6", "-b 100k"},
		{"tar -c img", "(head -c 70000 | gzip; cat | gzip)", "-b 100k"},
		{"tar -c img", "python3 -c 'import gzip,sys; sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read()))'", "-b 100k"},
	} {
		t.Run(fmt.Sprintf("%02d", i), func(t *testing.T) {
			sh(t, dir, "rm -f p.part.* t.tar; { "+c.tar+"; } > t.tar; cat t.tar | "+c.gzip+" | openssl enc -e -aes-128-cbc -K $K -iv $IV | split -d -a 3 "+c.split+" - p.part.", env...)
			tar, err := os.ReadFile(filepath.Join(dir, "t.tar"))
			if err != nil {
				t.Fatal(err)
			}
			names, err := filepath.Glob(filepath.Join(dir, "p.part.*"))
			if err != nil || len(names) == 0 {
				t.Fatal(err)
			}
			slices.Sort(names)
			m := *f.base
			m.Size, m.Digest, m.BundledSize, m.Parts = int64(len(data)), sha1.Sum(tar), 0, nil
			for _, n := range names {
				b, err := os.ReadFile(n)
				if err != nil {
					t.Fatal(err)
				}
				m.BundledSize += int64(len(b))
				m.Parts = append(m.Parts, ManifestPart{filepath.Base(n), sha1.Sum(b)})
			}
			doc, err := m.encode(f.user.key)
			if err != nil {
				t.Fatal(err)
			}
			got, err := ParseManifest(doc)
			if err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(t.TempDir(), "out")
			if err := UnbundleFile(t.Context(), UnbundleOptions{Key: f.user.key}, got, dirSource(dir), out); err != nil {
				t.Fatal(err)
			}
			img, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(img, data) {
				t.Error("image differs")
			}
			var st unix.Stat_t
			if err := unix.Stat(out, &st); err != nil {
				t.Fatal(err)
			}
			if st.Blocks*512 > int64(len(data))-500_000 {
				t.Errorf("output takes %d bytes: not sparse", st.Blocks*512)
			}
		})
	}
}
