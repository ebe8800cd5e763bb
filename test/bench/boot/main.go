// Command boot measures a boot, part by part: of a captured Debian by Instar's
// initrd, from the local disk and fetched with a launch ticket, against the same
// image booted from the same disk by Debian's own initrd. All machines are
// QEMU's, emulated, with the same kernel; seconds are counted from QEMU's start.
//
//	go run ./test/bench/boot [-runs N]
//
// It needs root, the packages test/tools installs, and about 3 GiB in the
// user's cache directory and below $TMPDIR.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"text/tabwriter"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/initrd/launch"
	"github.com/instar-image/instar/test/bench/internal/shell"
)

func main() {
	runs := flag.Int("runs", 3, "boots of each kind, alternating; medians count")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, *runs); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bencher has what all boots share.
type bencher struct {
	dir          string
	kernel       string
	disk, image  string // the instance's disk; the image it was made from
	ours, debian string // initrds
	bundle       string // directory of the bundle of image
}

// The block cipher's key and vector of the bundle, as a ticket tells them.
const key, iv = "000102030405060708090a0b0c0d0e0f", "0f0e0d0c0b0a09080706050403020100"

func bench(ctx context.Context, runs int) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, to unpack a Debian with its owners")
	}
	dir, err := os.MkdirTemp("", "instar-bench-boot-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bencher{
		dir: dir, disk: filepath.Join(dir, "disk"), image: filepath.Join(dir, "image"),
		ours: filepath.Join(dir, "instar.initrd"), debian: filepath.Join(dir, "debian.initrd"), bundle: filepath.Join(dir, "bundle"),
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	kinds := []kind{
		{"Debian's initrd, local disk", b.direct},
		{"Instar's, local disk", b.local},
		{"Instar's, fetched by ticket", b.ticket},
	}
	measured := make([][]result, len(kinds))
	for n := range runs {
		for i, k := range kinds {
			fmt.Fprintf(os.Stderr, "== boot %d of %d: %s\n", n+1, runs, k.name)
			r, err := k.boot(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			measured[i] = append(measured[i], r)
		}
	}
	medians := make([]result, len(kinds))
	for i, all := range measured {
		medians[i] = median(all)
	}
	b.print(kinds, medians, runs)
	return nil
}

// kind is a way to boot.
type kind struct {
	name string
	boot func(context.Context) (result, error)
}

// prepare makes the image, the disk of an instance of it, both initrds and the
// bundle.
func (b *bencher) prepare(ctx context.Context) error {
	tree := filepath.Join(b.dir, "tree")
	if _, err := shell.Run(ctx, `
tar=$(test/debian kernel)
mkdir "$1"
tar -C "$1" -xf "$tar"
printf 'LABEL=root / ext4 defaults 0 1\n' >"$1/etc/fstab"
mke2fs -q -t ext4 -L root -d "$1" "$2" 900M`, tree, b.image); err != nil {
		return err
	}
	// Booted directly it is to be an instance too: made one beforehand.
	if _, err := inject.Apply(ctx, inject.Options{Root: tree, Run: filepath.Join(b.dir, "run")}, inject.Instance{ID: "i-direct", Hostname: "direct"}); err != nil {
		return err
	}
	if _, err := shell.Run(ctx, `mke2fs -q -t ext4 -L root -d "$1" "$2" 900M; cp "$1"/boot/initrd.img-* "$3"; rm -rf "$1"`, tree, b.disk, b.debian); err != nil {
		return err
	}
	kernel, _, modules, err := launch.KernelOf(ctx, b.image, b.dir)
	if err != nil {
		return err
	}
	b.kernel = kernel
	_, err = shell.Run(ctx, `
export CGO_ENABLED=0
go build -buildvcs=false -trimpath -ldflags='-s -w' -o "$1" ./cmd/instar ./cmd/instar-init
"$1/instar" initrd build -o "$2" --modules "$3" --init "$1/instar-init" --param fail=poweroff --quiet >&2
for who in user ec2; do
	openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=bench -keyout "$1/$who.key" -out "$1/$who.crt" 2>/dev/null
done
mkdir "$4"
"$1/instar" bundle-image -i "$5" -k "$1/user.key" -c "$1/user.crt" --ec2cert "$1/ec2.crt" -u 111122223333 -r x86_64 \
	-d "$4" -p bench --enc-key `+key+` --enc-iv `+iv+` --quiet >&2`, b.dir, b.ours, modules, b.bundle, b.image)
	return err
}

// points are what a boot passes, in its order.
var points = []string{"init", "lease", "root", "system", "sshd"}

var meaning = map[string]string{
	"init": "the initrd's init runs", "lease": "an address by DHCP", "root": "the root is mounted",
	"system": "the image's systemd runs", "sshd": "sshd answers",
}

// cost is what was spent up to a point.
type cost struct{ wall, cpu float64 } // seconds

// result is what a boot took.
type result struct {
	at      map[string]cost
	fetched int64 // bytes from the store
}

func median(all []result) result {
	m := result{at: make(map[string]cost), fetched: all[len(all)/2].fetched}
	for _, p := range points {
		var wall, cpu []float64
		for _, r := range all {
			if c, ok := r.at[p]; ok {
				wall, cpu = append(wall, c.wall), append(cpu, c.cpu)
			}
		}
		if len(wall) == 0 {
			continue
		}
		slices.Sort(wall)
		slices.Sort(cpu)
		m.at[p] = cost{wall[len(wall)/2], cpu[len(cpu)/2]}
	}
	return m
}

func (b *bencher) print(kinds []kind, results []result, runs int) {
	size := func(name string) int64 {
		st, err := os.Stat(name)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Printf("\nA boot, emulated, by part: wall and CPU seconds since the start, and CPU beyond Debian's; medians of %d\n\n", runs)
	fmt.Fprint(w, "up to\t")
	for _, k := range kinds {
		fmt.Fprintf(w, "%s\t", k.name)
	}
	fmt.Fprintln(w)
	for _, p := range points {
		fmt.Fprintf(w, "%s: %s\t", p, meaning[p])
		base, known := results[0].at[p]
		for i, r := range results {
			c, ok := r.at[p]
			switch {
			case !ok:
				fmt.Fprint(w, "-\t")
			case i == 0 || !known:
				fmt.Fprintf(w, "%.1f wall, %.1f CPU\t", c.wall, c.cpu)
			default:
				fmt.Fprintf(w, "%.1f wall, %.1f CPU (%.2fx, %+.1f)\t", c.wall, c.cpu, c.cpu/base.cpu, c.cpu-base.cpu)
			}
		}
		fmt.Fprintln(w)
	}
	fmt.Fprint(w, "bytes of the initrd\t")
	for i := range kinds {
		name := b.ours
		if i == 0 {
			name = b.debian
		}
		fmt.Fprintf(w, "%.1f MB\t", float64(size(name))/1e6)
	}
	fmt.Fprint(w, "\nbytes fetched for the root\t")
	for _, r := range results {
		fmt.Fprintf(w, "%.1f MB\t", float64(r.fetched)/1e6)
	}
	fmt.Fprintln(w)
	w.Flush()
}
