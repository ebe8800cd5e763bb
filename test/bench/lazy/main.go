// Command lazy measures lazy boots of a Debian, whose image has 300 MB and more
// in the store: its disk fetched before the boot, while it runs, and while it runs
// with a boot trace by which it is laid out; from a store far away (20 MB/s, 30 ms)
// and one that is near; and against the same image booted from the local disk. It
// also measures the first byte of a file that "instar mount" gives, against curl. All machines
// are QEMU's, emulated; seconds are counted from QEMU's start.
//
//	go run ./test/bench/lazy [-runs N] [-only REGEXP] [-dir DIR]
//
// What is measured has names: a way to boot and its line, "lazy+trace, near", or
// "mount". -only measures those that a regular expression matches.
//
// It needs root, the packages test/tools installs, and about 6 GiB below $TMPDIR.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/test/bench/internal/shell"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

func main() {
	runs := flag.Int("runs", 1, "boots of each kind; medians count")
	only := flag.String("only", "", "measure what this regular `expression` matches")
	dir := flag.String("dir", "", "keep the image and the programs in this `directory`, and use those of a run before")
	flag.Parse()
	chosen, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: -only:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, *dir, *runs, chosen); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// kind is a way to boot.
type kind struct {
	name   string
	mode   ticket.Mode // "": from the local disk
	traced bool        // the version that is laid out by a boot trace, and has it
}

var kinds = []kind{
	{"local disk", "", false},
	{"eager", ticket.Eager, false},
	{"lazy", ticket.Lazy, false},
	{"lazy+trace", ticket.Lazy, true},
}

var lines = []line{{"20 MB/s, 30 ms", 20e6, 30 * time.Millisecond}, {"near", 0, 0}}

// version is one of the image's.
type version struct {
	image  *images.Image
	disk   *chunked.Stream
	stored int64 // bytes of its packs and index
	touch  int64 // sealed bytes of the pieces that its trace names
}

// room is what a lazy boot's disk needs, in bytes.
func (v *version) room() int64 { return (lazyroot.DiskSize(v.disk.Size()) + 1<<20 - 1) >> 20 << 20 }

type bencher struct {
	dir                   string
	kernel, initrd, local string // files
	objects               upload.Store
	store                 *images.Store
	signers               string // allowed_signers
	plain, traced         *version
}

func bench(ctx context.Context, dir string, runs int, only *regexp.Regexp) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, to unpack a Debian with its owners")
	}
	if dir == "" {
		if dir, err = os.MkdirTemp("", "instar-bench-lazy-*"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	} else if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	b := &bencher{dir: dir}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.objects.Close()) }()
	all := map[kind]map[line]result{}
	for _, k := range kinds {
		all[k] = map[line]result{}
		for _, l := range lines {
			if k.mode == "" && l.rate != 0 || !only.MatchString(k.name+", "+l.name) {
				continue // what is on the local disk has no store
			}
			var list []result
			for range runs {
				fmt.Fprintf(os.Stderr, "booting: %s, store %s\n", k.name, l.name)
				r, err := b.boot(ctx, k, l)
				if err != nil {
					return err
				}
				list = append(list, r)
			}
			all[k][l] = median(list)
		}
	}
	b.show(all)
	rows := b.targets(all)
	if only.MatchString("mount") {
		more, err := b.first(ctx)
		if err != nil {
			return err
		}
		rows = append(rows, more...)
	}
	return show(rows)
}

// median is that of each figure.
func median(list []result) result {
	m := result{at: map[string]point{}}
	mid := func(get func(result) float64) float64 {
		var v []float64
		for _, r := range list {
			v = append(v, get(r))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	m.demand = int(mid(func(r result) float64 { return float64(r.demand) }))
	for _, p := range points {
		if _, ok := list[0].at[p]; !ok {
			continue
		}
		m.at[p] = point{
			mid(func(r result) float64 { return r.at[p].wall }), mid(func(r result) float64 { return r.at[p].cpu }),
			traffic{
				int(mid(func(r result) float64 { return float64(r.at[p].requests) })), int(mid(func(r result) float64 { return float64(r.at[p].packs) })),
				int64(mid(func(r result) float64 { return float64(r.at[p].bytes) })),
			},
		}
	}
	return m
}

// prepare makes the image, records a boot of it, and lays it out by that.
func (b *bencher) prepare(ctx context.Context) error {
	keysDir, store, tree := filepath.Join(b.dir, "keys"), filepath.Join(b.dir, "store"), filepath.Join(b.dir, "tree")
	for _, env := range [][2]string{{"INSTAR_ETC", keysDir}, {"INSTAR_STATE", filepath.Join(b.dir, "state")}} {
		if err := os.Setenv(env[0], env[1]); err != nil {
			return err
		}
	}
	if _, err := shell.Run(ctx, `
test ! -e "$1/prepared" || exit 0
tar=$(test/debian kernel)
mkdir -p "$2"
tar -C "$2" -xf "$tar"
printf 'LABEL=root / ext4 defaults 0 1\n' >"$2/etc/fstab"
# What a machine has and no boot reads: large files and small ones.
mkdir -p "$2/srv/data"
for i in $(seq 40); do head -c 5000000 /dev/urandom >"$2/srv/data/large-$i"; done
for i in $(seq 1000); do head -c 50000 /dev/urandom >"$2/srv/data/small-$i"; done
export CGO_ENABLED=0
go build -buildvcs=false -trimpath -ldflags='-s -w' -o "$1" ./cmd/instar ./cmd/instar-init
capture() { "$1/instar" create-image --store "$3" -n bench -v "$2" --all -s 1200 -r x86_64 --init "$1/instar-init" --quiet "${@:4}" >&2 || test $? = 24; }
capture "$@"
ssh-keygen -q -t ed25519 -N '' -f "$1/ssh"
"$1/instar" launch bench --store "$3" --record-trace --record-for 5 --ssh-key "$1/ssh.pub" --accel tcg --scratch "$1" >&2
capture "$@" --boot-trace bench
"$1/instar" restore bench@parent --store "$3" --to "$1/local" >&2
"$1/instar" restore bench@parent --store "$3" --stream kernel --to "$1/kernel" >&2
"$1/instar" restore bench@parent --store "$3" --stream initrd --to "$1/initrd" >&2
touch "$1/prepared"`, b.dir, tree, store); err != nil {
		return err
	}
	b.kernel, b.initrd, b.local = filepath.Join(b.dir, "kernel"), filepath.Join(b.dir, "initrd"), filepath.Join(b.dir, "local")
	m := machine.Open(machine.Options{Dir: keysDir})
	ids, err := m.Identities()
	if err != nil {
		return err
	}
	trust, err := m.Signers(nil)
	if err != nil {
		return err
	}
	if b.objects, err = upload.Open(ctx, "file://"+store, upload.Options{}); err != nil {
		return err
	}
	if b.store, err = images.Open(b.objects, images.Options{Trust: trust, Identities: ids}); err != nil {
		return err
	}
	if b.plain, err = b.version(ctx, "bench@parent"); err != nil {
		return err
	}
	if b.traced, err = b.version(ctx, "bench"); err != nil {
		return err
	}
	b.signers = keys.AllowedSigner{Principals: "bench", Key: b.plain.image.Signer}.String() + "\n"
	return nil
}

func (b *bencher) version(ctx context.Context, ref string) (*version, error) {
	v := &version{}
	var err error
	if v.image, err = b.store.Resolve(ctx, ref, images.ResolveOptions{}); err != nil {
		return nil, err
	}
	index, err := v.image.Open(ctx)
	if err != nil {
		return nil, err
	}
	if v.disk, err = index.Stream(chunked.StreamDisk); err != nil {
		return nil, err
	}
	seen := map[chunked.Digest]bool{}
	for e, err := range v.disk.Extents(ctx, 0, v.disk.Size()) {
		if err != nil {
			return nil, err
		}
		if !seen[e.Chunk.Digest] {
			seen[e.Chunk.Digest] = true
			v.stored += int64(e.Chunk.At.Sealed)
		}
	}
	t, err := v.image.Trace(ctx)
	if err != nil {
		return nil, err
	}
	seen = map[chunked.Digest]bool{}
	for _, r := range t.Ranges {
		for e, err := range v.disk.Extents(ctx, r.Position, r.Position+r.Length) {
			if err != nil {
				return nil, err
			}
			if !seen[e.Chunk.Digest] {
				seen[e.Chunk.Digest] = true
				v.touch += int64(e.Chunk.At.Sealed)
			}
		}
	}
	return v, nil
}

func mb(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }

// show prints what each boot took.
func (b *bencher) show(all map[kind]map[line]result) {
	fmt.Printf("The disk's pieces have %s MB in the store; those that a boot reads %s MB as they lie, %s MB laid out by its trace.\n\n",
		mb(b.plain.stored), mb(b.plain.touch), mb(b.traced.touch))
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "boot\tstore\tto\tseconds\tguest CPU s\tMB fetched\trequests")
	for _, k := range kinds {
		for _, l := range lines {
			r, ok := all[k][l]
			if !ok {
				continue
			}
			for _, p := range points {
				if x, ok := r.at[p]; ok {
					fmt.Fprintf(w, "%s\t%s\t%s\t%.1f\t%.1f\t%s\t%d\n", k.name, l.name, p, x.wall, x.cpu, mb(x.bytes), x.requests)
				}
			}
		}
	}
	w.Flush()
	fmt.Println()
}

// row is a line of the table of targets.
type row struct {
	what          string
	value, target float64
	unit          string
}

// targets are what boots were to reach, of those that were measured.
func (b *bencher) targets(all map[kind]map[line]result) (rows []row) {
	local, hasLocal := all[kinds[0]][lines[1]]
	eager, hasEager := all[kinds[1]][lines[0]]
	traced, ok := all[kinds[3]][lines[0]]
	if !ok {
		return nil
	}
	rows = append(rows,
		row{"bytes before sshd, lazy+trace, of those stored", 100 * float64(traced.at["sshd"].bytes) / float64(b.traced.stored), 10, "%"},
		row{"bytes before sshd, lazy+trace, to what the trace's pieces have", float64(traced.at["sshd"].bytes) / float64(b.traced.touch), 1.2, "x"},
		row{"reads that waited for a fetch of their own until all was there, lazy+trace", float64(traced.demand), 5, ""})
	if hasEager {
		rows = append(rows, row{"seconds to sshd, lazy+trace to eager, " + lines[0].name, traced.at["sshd"].wall / eager.at["sshd"].wall, 0.5, "x"})
	}
	if hasLocal {
		rows = append(rows,
			row{"guest CPU seconds to sshd, lazy+trace less a boot from the local disk", traced.at["sshd"].cpu - local.at["sshd"].cpu, 12, "s"},
			row{"  of them before the image's system runs", traced.at["root"].cpu - local.at["root"].cpu, 12, "s"})
	}
	return rows
}

// first measures the first byte of a file on a workstation.
func (b *bencher) first(ctx context.Context) ([]row, error) {
	cold, warm, err := b.workstation(ctx)
	if err != nil {
		return nil, err
	}
	for _, o := range []struct {
		how string
		opening
	}{{"on a machine that knows nothing of the image", cold}, {"mounted again", warm}} {
		fmt.Printf("A file's first byte, %s: after %.2f s, of which the mount took %.2f, by requests for %s; the same by curl: %.2f s.\n", o.how, o.took, o.mounted, o.kinds(), o.curl)
	}
	fmt.Println()
	return []row{
		{"requests to the first byte that the kernel is given of the disk, the version named in full", float64(cold.first()), 5, ""},
		{"requests to the first byte of a file, mounted by \"instar mount\", the version named in full", float64(cold.requests), 5, ""},
		{"seconds to it, to curl fetching the same ranges", cold.took / cold.curl, 3, "x"},
		{"  requests, mounted again on the same machine", float64(warm.requests), 5, ""},
		{"  seconds to it, to curl fetching the same ranges", warm.took / warm.curl, 3, "x"},
	}, nil
}

// show prints what was to be reached, and what was.
func show(rows []row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "what\tmeasured\ttarget\t")
	for _, r := range rows {
		met := "MET"
		if r.value > r.target || r.value < 0 && r.unit == "" {
			met = "MISSED"
		}
		fmt.Fprintf(w, "%s\t%.2f %s\t%g %s\t%s\n", r.what, r.value, r.unit, r.target, r.unit, met)
	}
	return w.Flush()
}
