package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// firstFile is the file whose first byte is read: no boot reads it, so nothing of it
// lies where a boot trace has gathered what a boot reads.
const firstFile = "srv/data/small-500"

// opening is what it took to read the first byte of a file of an image that was
// mounted for it.
type opening struct {
	requests int
	mounted  float64 // seconds, until "instar mount" was back
	took     float64 // seconds, from its start to the byte
	curl     float64 // seconds that curl takes to fetch the same, one after the other
	list     []fetched
}

// workstation mounts the image, named in full, with "instar mount" and reads a file's
// first byte through the kernel, from MinIO at the end of a line: on a machine that
// has seen nothing of the image, and then again. Each time curl fetches what the
// store was asked for, by the same way.
func (b *bencher) workstation(ctx context.Context) (cold, warm opening, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	scratch := []string{filepath.Join(b.dir, "minio"), filepath.Join(b.dir, "workstation")} // of a run before
	for _, dir := range scratch {
		if err := os.RemoveAll(dir); err != nil {
			return cold, warm, err
		}
	}
	m, err := startMinIO(ctx, scratch[0])
	if err != nil {
		return cold, warm, err
	}
	defer func() { err = errors.Join(err, m.stop()) }()
	if err := m.fill(ctx, b.objects); err != nil {
		return cold, warm, err
	}
	way, err := m.behind(lines[0])
	if err != nil {
		return cold, warm, err
	}
	defer way.Close()
	for _, o := range []*opening{&cold, &warm} {
		if *o, err = b.mount(ctx, m, way); err != nil {
			return cold, warm, err
		}
	}
	return cold, warm, nil
}

// mount measures one mount, with what the machine remembers of those before.
func (b *bencher) mount(ctx context.Context, m *minio, way *way) (o opening, err error) {
	at := filepath.Join(b.dir, "at")
	if err := os.MkdirAll(at, 0o755); err != nil {
		return o, err
	}
	way.forget()
	ref := "bench@" + b.traced.image.Name.String()
	begun := time.Now()
	cmd := exec.CommandContext(ctx, filepath.Join(b.dir, "instar"), "mount", ref, at, "--store", "s3://"+bucket, "--quiet")
	cmd.Env = append(append(os.Environ(), m.env(way.url)...), "INSTAR_STATE="+filepath.Join(b.dir, "workstation"))
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return o, fmt.Errorf("instar mount: %w\n%s", err, said.String())
	}
	defer func() {
		out, uerr := exec.CommandContext(ctx, filepath.Join(b.dir, "instar"), "umount", at).CombinedOutput()
		if uerr != nil {
			err = errors.Join(err, fmt.Errorf("instar umount: %w\n%s", uerr, out))
		}
	}()
	o.mounted = time.Since(begun).Seconds()
	f, err := os.Open(filepath.Join(at, firstFile))
	if err != nil {
		return o, err
	}
	_, err = f.Read(make([]byte, 1))
	o.took, o.list = time.Since(begun).Seconds(), way.asked()
	o.requests = len(o.list)
	if err := errors.Join(err, f.Close()); err != nil {
		return o, err
	}
	o.curl, err = m.curl(ctx, way.url, o.list)
	return o, err
}

// first is how many requests there were until the first that gave something of the disk
// was answered: of the image's opening, or of a pack.
func (o *opening) first() int {
	return 1 + slices.IndexFunc(o.list, func(r fetched) bool {
		return strings.HasPrefix(r.path, "/"+bucket+"/packs/") || strings.Contains(r.path, "/openings/")
	})
}

// kinds says how many requests were for what kind of object: the first part of their
// keys.
func (o *opening) kinds() string {
	count := map[string]int{}
	for _, r := range o.list {
		kind, _, _ := strings.Cut(strings.TrimPrefix(r.path, "/"+bucket+"/"), "/")
		count[kind]++
	}
	var list []string
	for _, kind := range slices.Sorted(maps.Keys(count)) {
		list = append(list, fmt.Sprintf("%d of %s", count[kind], kind))
	}
	return strings.Join(list, ", ")
}

// curl fetches ranges of objects one after the other by one connection.
func (m *minio) curl(ctx context.Context, base string, list []fetched) (seconds float64, err error) {
	var config strings.Builder
	for n, r := range list {
		if n > 0 {
			config.WriteString("next\n")
		}
		fmt.Fprintf(&config, "url = %q\noutput = /dev/null\nsilent\nshow-error\nfail\nnoproxy = \"*\"\nuser = %q\naws-sigv4 = \"aws:amz:us-east-1:s3\"\n", base+r.path, m.access+":"+m.secret)
		// What is signed of a request without a body.
		fmt.Fprintf(&config, "header = \"x-amz-content-sha256: UNSIGNED-PAYLOAD\"\n")
		if r.span != "" {
			fmt.Fprintf(&config, "range = %q\n", strings.TrimPrefix(r.span, "bytes="))
		}
	}
	cmd := exec.CommandContext(ctx, "curl", "--config", "-")
	cmd.Stdin = strings.NewReader(config.String())
	begun := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("curl: %w\n%s", err, out)
	}
	return time.Since(begun).Seconds(), nil
}
