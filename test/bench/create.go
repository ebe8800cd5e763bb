package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// increment is the Debian tree some days later: packages, settings, a web
// site's files and a log more. It is made once, by the tree's own apt.
func (b *bencher) increment() (string, error) {
	tree := filepath.Join(b.cache, "bookworm-v2")
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	fmt.Fprintln(os.Stderr, "making the second version of the Debian tree, once")
	_, err := b.bash(`
new=` + tree + `.new; rm -rf $new; cp -a ` + b.tree + ` $new
printf '#!/bin/sh\nexit 101\n' >$new/usr/sbin/policy-rc.d; chmod 755 $new/usr/sbin/policy-rc.d
chroot $new env DEBIAN_FRONTEND=noninteractive sh -ec 'apt-get update -q; apt-get install -y -q --no-install-recommends tcpdump python3-flask lighttpd redis-server' </dev/null >&2
rm -rf $new/usr/sbin/policy-rc.d $new/var/lib/apt/lists/* $new/var/cache/apt/*.bin $new/var/cache/apt/archives/*.deb
rm -rf $new/var/log/apt $new/var/cache/man; cp -a ` + b.tree + `/var/cache/apt/*.bin $new/var/cache/apt/; cp -a ` + b.tree + `/var/cache/man $new/var/cache/
echo 'net.core.somaxconn = 4096' >>$new/etc/sysctl.conf; sed -i 's/worker_connections 768/worker_connections 4096/' $new/etc/nginx/nginx.conf
mkdir $new/var/www/assets; for i in $(seq 40); do openssl rand -out $new/var/www/assets/picture-$i.jpg $((20000 + i * 997)); done
seq -f '192.0.2.7 - - [22/Nov/2026:05:30:00 +0000] "GET /page/%.0f HTTP/1.1" 200 612 "-" "curl/7.88.1"' 12000 >$new/var/log/nginx/access.log
mv $new ` + tree)
	return tree, err
}

// A tool keeps all it needs in $W/NAME.
type tool struct {
	name    string
	init    string // bash, before the first backup
	backup  string // bash, of $W/tree
	restore string // bash, of the newest to $W/out
	stored  string // below $W/NAME, what is stored; "" all of it
}

// peerTools back a tree up. All encrypt but tar and casync.
func peerTools() []tool {
	return []tool{
		{
			name: "tar", init: `mkdir -p $W/tar`,
			backup:  `tar -c -C $W/tree . | zstd -q -3 -T2 -o $W/tar/$RANDOM$RANDOM.tar.zst`,
			restore: `mkdir $W/out; zstd -q -d -c $(ls -t $W/tar/*.zst | head -1) | tar -x -C $W/out`,
		},
		{
			name: "restic", init: `mkdir -p $W/restic; restic -q init`,
			backup:  `cd $W/tree; restic -q backup .`,
			restore: `restic -q restore latest --target $W/out`, stored: "repo",
		},
		{
			name: "borg", init: `mkdir -p $W/borg; borg init -e repokey-blake2 $BORG_REPO`,
			backup:  `cd $W/tree; borg create -C zstd,3 ::$RANDOM$RANDOM .`,
			restore: `mkdir $W/out; cd $W/out; borg extract ::$(borg list --short --last 1)`, stored: "repo",
		},
	}
}

const toolEnv = `export RESTIC_REPOSITORY=$W/restic/repo RESTIC_PASSWORD=bench RESTIC_CACHE_DIR=$W/restic/cache
export BORG_REPO=$W/borg/repo BORG_BASE_DIR=$W/borg/base BORG_PASSPHRASE=bench
export INSTAR_ETC=$W/images/etc INSTAR_STATE=$W/images/state INSTAR_STORE=$W/images/repo
`

// ourTool is the program in the same role.
func (b *bencher) ourTool() tool {
	return tool{
		name: "images", init: `mkdir -p $W/images`,
		backup:  b.instar + ` create-image --store $INSTAR_STORE --name bench -v $W/tree --no-filter --quiet`,
		restore: b.instar + ` restore bench --store $INSTAR_STORE --to $W/out.img --quiet`, stored: "repo",
	}
}

// kept is what a tool has after its first backup, to begin the second from.
func (t tool) kept() string { return "$W/" + t.name + ".v1" }

// images: creating an image of a tree, of its next version, and restoring that.
func (b *bencher) images() ([]row, error) {
	next, err := b.increment()
	if err != nil {
		return nil, err
	}
	ours, peers := b.ourTool(), peerTools()
	tools := append([]tool{ours}, peers...)
	if _, err := b.bash(`cp -a ` + b.tree + ` $W/tree; sync; sleep 3`); err != nil {
		return nil, err
	}
	run := func(t tool, script string) (cost, error) { return b.bash(toolEnv + script) }
	first, firstSize, err := b.contest(tools,
		func(t tool) string { return "rm -rf $W/" + t.name + " " + t.kept() + "; " + t.init },
		func(t tool) (cost, error) { return run(t, t.backup) })
	if err != nil {
		return nil, err
	}
	objects, err := filesIn(filepath.Join(b.work, "images", "repo"))
	if err != nil {
		return nil, err
	}
	// In place, as a system changes: what did not change keeps inode and times.
	if _, err := b.bash(`for t in images tar restic borg; do mv $W/$t $W/$t.v1; done; rsync -aHAX --delete ` + next + `/ $W/tree/; sync; sleep 3`); err != nil {
		return nil, err
	}
	second, secondSize, err := b.contest(tools,
		func(t tool) string { return "rm -rf $W/" + t.name + "; cp -a " + t.kept() + " $W/" + t.name },
		func(t tool) (cost, error) { return run(t, t.backup) })
	if err != nil {
		return nil, err
	}
	added := func(name string) int64 { return secondSize[name] - firstSize[name] }
	rows := []row{
		versus("create-image, the Debian tree: wall, against tar | zstd -3 -T2, which does not encrypt", first, "images", "tar", 1.0),
		versus("  against restic's first backup", first, "images", "restic", 0.3),
		versus("  against borg's", first, "images", "borg", 0.3),
		{"  stored, against restic", size(firstSize["images"]), size(firstSize["restic"]), float64(firstSize["images"]) / float64(firstSize["restic"]), 1.0, "x"},
		{"  peak memory", size(first["images"].rss), "", float64(first["images"].rss) / mib, 200, "MiB"},
		{"  objects in the store", fmt.Sprint(objects), "", float64(objects), 40, "objects"},
		versus("create-image, its next version: wall, against restic's second backup", second, "images", "restic", 0.25),
		versus("  against borg's", second, "images", "borg", 0.25),
		{"  added, index and manifest counted, against borg", size(added("images")), size(added("borg")), float64(added("images")) / float64(added("borg")), 1.05, "x"},
		{"  peak memory", size(second["images"].rss), "", float64(second["images"].rss) / mib, 200, "MiB"},
	}
	more, err := b.restores(tools)
	return append(rows, more...), err
}

func versus(what string, costs map[string]cost, ours, peer string, target float64) row {
	o, p := costs[ours], costs[peer]
	return row{what, o.String(), p.String(), o.wall / p.wall, target, "x"}
}

// even makes things alike for whoever runs next: what was written before is on
// the disk, and as much memory as any of them fills with files has been used,
// which a virtual machine pays for once.
const even = `
head -c 1200M /dev/zero >$W/even; rm $W/even; sync`

// contest runs all tools in turn, as often as is asked for, each time beginning
// with another, and returns the medians and what each has stored in the end.
func (b *bencher) contest(tools []tool, before func(tool) string, measure func(tool) (cost, error)) (map[string]cost, map[string]int64, error) {
	all, sizes := map[string][]cost{}, map[string]int64{}
	for run := range b.runs {
		for i := range tools {
			t := tools[(i+run)%len(tools)]
			if _, err := b.bash(toolEnv + before(t) + even); err != nil {
				return nil, nil, err
			}
			c, err := measure(t)
			if err != nil {
				return nil, nil, err
			}
			all[t.name] = append(all[t.name], c)
			if sizes[t.name], err = bytesIn(filepath.Join(b.work, t.name, t.stored)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, nil, err
			}
		}
	}
	medians := map[string]cost{}
	for name, costs := range all {
		medians[name] = median(costs)
	}
	return medians, sizes, nil
}

// restores brings the newest version back. casync's side is an image, as ours
// is: it has the same tree as an ext4 image, chunked beforehand.
func (b *bencher) restores(tools []tool) ([]row, error) {
	if _, err := b.bash(`mkdir -p $W/casync; mke2fs -q -t ext4 -d $W/tree $W/casync/image 1200M; cd $W/casync; casync make --store=$W/casync/store v2.caibx image >/dev/null`); err != nil {
		return nil, err
	}
	tools = append(tools, tool{name: "casync", restore: `casync extract --store=$W/casync/store $W/casync/v2.caibx $W/out.img`})
	costs, _, err := b.contest(tools, func(tool) string { return "rm -rf $W/out $W/out.img" }, func(t tool) (cost, error) { return b.bash(toolEnv + t.restore) })
	if err != nil {
		return nil, err
	}
	return []row{
		versus("restore of the image: wall, against casync extract, which does not decrypt", costs, "images", "casync", 0.45),
		versus("  against restic restore", costs, "images", "restic", 0.25),
		versus("  against borg extract", costs, "images", "borg", 0.25),
		{"  peak memory", size(costs["images"].rss), "", float64(costs["images"].rss) / mib, 200, "MiB"},
	}, nil
}

// filesIn counts the files below a directory.
func filesIn(dir string) (n int, err error) {
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(d.Name(), ".") {
			n++
		}
		return err
	})
	return n, err
}
