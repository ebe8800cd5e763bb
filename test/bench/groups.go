package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

const mib = 1 << 20

// identity is the options every bundling command takes.
func (b *bencher) identity(dest string) []string {
	return []string{
		"-k", b.work + "/user.key", "-c", b.work + "/user.crt", "--ec2cert", b.work + "/ec2.crt", "-u", "111122223333", "-r", "x86_64",
		"-d", dest, "-p", "bench", "--enc-key", key, "--enc-iv", iv, "--quiet",
	}
}

const encrypt = `openssl enc -aes-128-cbc -K ` + key + ` -iv ` + iv

// fresh empties the directories the sides write to.
const fresh = `umount $W/mnt 2>/dev/null || true; rm -rf $W/a $W/b $W/mnt $W/vol.img; mkdir -p $W/a $W/b $W/mnt`

// image: bundling a 1 GiB ext4 image.
func (b *bencher) image() ([]row, error) {
	dest, theirs := b.work+"/a", b.work+"/b"
	ours := side{fresh, func() (cost, error) {
		return b.ours(append([]string{"bundle-image", "-i", b.img}, b.identity(dest)...)...)
	}}
	pipe := func(pack string) func() (cost, error) {
		return func() (cost, error) {
			return b.bash(`tar -c -S -h --owner=0 --group=0 -C $W disk.img | ` + pack + ` | ` + encrypt + ` | split -b 10M -a 4 -d - $W/b/bench.part.`)
		}
	}
	var sizes [2]int64
	measured := func(s side, i int, dir string) side {
		return side{s.before, func() (cost, error) {
			c, err := s.run()
			if err == nil {
				sizes[i], err = bytesIn(dir)
			}
			return c, err
		}}
	}
	o, p, err := b.duel(measured(ours, 0, dest), measured(side{fresh, pipe("pigz -6 -c")}, 1, theirs))
	if err != nil {
		return nil, err
	}
	if _, err := b.bash(fresh); err != nil {
		return nil, err
	}
	slow, err := pipe("gzip -9 -c")() // once: it takes minutes
	if err != nil {
		return nil, err
	}
	return []row{
		{"bundle-image, 1 GiB ext4: wall, against tar | pigz -6 | openssl | split", o.String(), p.String(), o.wall / p.wall, 0.33, "x"},
		{"  size, against the same", size(sizes[0]), size(sizes[1]), float64(sizes[0]) / float64(sizes[1]), 1.03, "x"},
		{"  CPU, against gzip -9 in the same pipe", o.String(), slow.String(), o.cpu / slow.cpu, 1.0 / 12, "x"},
	}, nil
}

func size(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/mib) }

// unbundle: opening our bundles, and those of the peers.
func (b *bencher) unbundle() ([]row, error) {
	var rows []row
	for _, k := range []struct {
		what   string
		make   func(dir string) error
		target float64
	}{
		{"unbundle, our bundle of it: wall, against cat | openssl | pigz -d | tar -x", func(dir string) error {
			_, err := b.ours(append([]string{"bundle-image", "-i", b.img}, b.identity(dir)...)...)
			return err
		}, 0.7},
		{"unbundle, a bundle of gzip -9 and openssl: wall, against the same", func(dir string) error {
			_, err := b.bash(`PACK='gzip -9' KEY=` + key + ` IV=` + iv + ` test/peer-bundle $W/disk.img bench ` + dir + ` $W/user.key $W/user.crt $W/ec2.crt`)
			return err
		}, 1.2},
	} {
		dir := filepath.Join(b.work, "bundle")
		if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
			return nil, err
		}
		if err := k.make(dir); err != nil {
			return nil, err
		}
		o, p, err := b.duel(
			side{fresh, func() (cost, error) {
				return b.ours("unbundle", "-m", dir+"/bench.manifest.xml", "-s", dir, "-k", b.work+"/user.key", "-d", b.work+"/a", "--quiet")
			}},
			side{fresh, func() (cost, error) {
				return b.bash(`cat ` + dir + `/bench.part.* | openssl enc -d -aes-128-cbc -K ` + key + ` -iv ` + iv + ` | pigz -d -c | tar -x -S -C $W/b`)
			}})
		if err != nil {
			return nil, err
		}
		if _, err := b.bash(`cmp $W/disk.img $W/b/*`); err != nil {
			return nil, err
		}
		rows = append(rows, row{k.what, o.String(), p.String(), o.wall / p.wall, k.target, "x"})
	}
	return rows, nil
}

// vol: capturing a tree.
func (b *bencher) vol() ([]row, error) {
	scratch := filepath.Join(b.work, "scratch")
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return nil, err
	}
	// All a capture could use as scratch is this small tmpfs: had it needed
	// more, it would fail.
	if err := syscall.Mount("tmpfs", scratch, "tmpfs", 0, "size=64k"); err != nil {
		return nil, err
	}
	b.mounts = append(b.mounts, scratch, filepath.Join(b.work, "mnt"))
	before := os.Getenv("TMPDIR")
	if err := os.Setenv("TMPDIR", scratch); err != nil {
		return nil, err
	}
	defer os.Setenv("TMPDIR", before)
	var image int64
	o, p, err := b.duel(
		side{fresh, func() (cost, error) {
			return b.ours(append([]string{
				"bundle-vol", "-v", b.tree, "--no-filter", "--no-inherit", "--size", "auto", "--scratch", scratch,
			}, b.identity(b.work+"/a")...)...)
		}},
		side{fresh, func() (cost, error) {
			c, err := b.bash(`truncate -s 1200M $W/vol.img; mkfs.ext4 -q -F $W/vol.img; mount -o loop $W/vol.img $W/mnt
rsync -aHAXS ` + b.tree + `/ $W/mnt/; umount $W/mnt
tar -c -S -h --owner=0 --group=0 -C $W vol.img | pigz -6 -c | ` + encrypt + ` | split -b 10M -a 4 -d - $W/b/bench.part.`)
			var st syscall.Stat_t
			if err == nil {
				err = syscall.Stat(b.work+"/vol.img", &st)
				image = st.Blocks * 512
			}
			return c, err
		}})
	if err != nil {
		return nil, err
	}
	tree, err := bytesIn(b.tree)
	if err != nil {
		return nil, err
	}
	return []row{
		{
			fmt.Sprintf("bundle-vol, Debian tree of %.0f MB: wall, against mkfs + loop + rsync + the pipe", float64(tree)/1e6),
			o.String(), p.String(), o.wall / p.wall, 0.4, "x",
		},
		{"  scratch disk", "0 MiB", size(image), 0, 0, "MiB"},
	}, nil
}

// memory: the largest resident set while capturing many files.
func (b *bencher) memory() ([]row, error) {
	many := filepath.Join(b.work, "many")
	if err := os.Mkdir(many, 0o755); err != nil {
		return nil, err
	}
	if err := syscall.Mount("tmpfs", many, "tmpfs", 0, "size=90%,nr_inodes=0"); err != nil {
		return nil, err
	}
	b.mounts = append(b.mounts, many)
	rss := func() (int64, error) {
		if _, err := b.bash(fresh); err != nil {
			return 0, err
		}
		c, err := b.ours(append([]string{
			"bundle-vol", "-v", many, "--no-filter", "--no-inherit", "--size", "auto",
		}, b.identity(b.work+"/a")...)...)
		return c.rss, err
	}
	const few, lots = 100_000, 2_000_000
	if err := fill(many, 0, few); err != nil {
		return nil, err
	}
	small, err := rss()
	if err != nil {
		return nil, err
	}
	// The bytes must not count: a gigabyte more of them.
	if _, err := b.bash(`head -c 1G /dev/urandom > ` + many + `/gigabyte`); err != nil {
		return nil, err
	}
	bytes, err := rss()
	if err != nil {
		return nil, err
	}
	if err := fill(many, few, lots); err != nil {
		return nil, err
	}
	large, err := rss()
	if err != nil {
		return nil, err
	}
	return []row{
		{"peak memory of bundle-vol, 100,000 files", size(small), "", float64(small) / mib, 150, "MiB"},
		{"  with another GiB of data", size(bytes), "", float64(bytes) / mib, 150, "MiB"},
		{"  a file more, up to 2,000,000 files", size(large), "", float64(large-bytes) / (lots - few), 200, "bytes"},
	}, nil
}

// fill makes files in directories of a thousand, one in ten with content.
func fill(dir string, from, to int) error {
	for i := from; i < to; i++ {
		sub := filepath.Join(dir, fmt.Sprintf("directory-%04d", i/1000))
		if i%1000 == 0 {
			if err := os.Mkdir(sub, 0o755); err != nil {
				return err
			}
		}
		content := ""
		if i%10 == 0 {
			content = fmt.Sprintf("content of file %d\n", i)
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file-%07d.txt", i)), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
