package imds

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// crawlScript runs cloud-init's Ec2 data source. Its first argument is what
// the machine's firmware says: "aws" makes it demand tokens.
const crawlScript = `
import json, logging, sys, tempfile
import cloudinit.dmi
from cloudinit import distros, helpers, sources
uuid = "ec2e1916-9099-7caf-fd21-012345abcdef"
dmi = {"system-uuid": uuid, "system-serial-number": uuid} if sys.argv[1] == "aws" else {}
cloudinit.dmi.read_dmi_data = dmi.get
from cloudinit.sources import DataSourceEc2
tmp = tempfile.mkdtemp()
paths = helpers.Paths({"cloud_dir": tmp, "run_dir": tmp})
cfg = {"datasource": {"Ec2": {"strict_id": False, "max_wait": 10, "timeout": 4, "apply_full_imds_network_config": True}}}
distro = distros.fetch("debian")("debian", cfg, paths)
ds = DataSourceEc2.DataSourceEc2(cfg, distro, paths)
ds._fallback_interface = "eth0"
assert ds._get_data(), "no data"
m = ds.metadata
print(json.dumps({"platform": ds.cloud_name, "version": ds.metadata_address and ds.get_metadata_api_version(), "id": ds.get_instance_id(),
  "hostname": str(ds.get_hostname().hostname if hasattr(ds.get_hostname(), "hostname") else ds.get_hostname()),
  "keys": ds.get_public_ssh_keys(), "zone": ds.availability_zone, "region": ds.region, "userdata": (ds.userdata_raw or b"").decode("utf8", "replace"),
  "mac": m.get("network", {}).get("interfaces", {}).get("macs", {}).get("02:00:00:00:00:0a", {}).get("device-number"),
  "groups": m["security-groups"], "devices": m["block-device-mapping"], "tags": m.get("tags", {}).get("instance")}))
`

// TestCloudInitCrawl is Debian's cloud-init reading the tree, as a machine
// that knows nothing of EC2 (version 1) and as one whose firmware says EC2.
func TestCloudInitCrawl(t *testing.T) {
	dir := unpack(t, "cloud-init")
	for _, c := range []struct{ platform, extra string }{{"unknown", ""}, {"aws", tokensRequired}} {
		s := cloud(t, c.extra)
		out := s.ns.run(t, []string{"PYTHONPATH=" + filepath.Join(dir, "usr/lib/python3/dist-packages")}, "/usr/bin/python3", "-c", crawlScript, c.platform)
		var got map[string]any
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatal(err)
		}
		want := map[string]any{
			"platform": c.platform, "version": "2021-03-23", "id": "i-0abc1234def567890", "hostname": "web-1", "keys": []any{sshKey, sshKey + "-too"},
			"zone": "eu-test-1a", "region": "eu-test-1", "userdata": "#!/bin/sh\nhostname >/var/lib/user-data-ran\necho more >>/var/lib/user-data-ran\n",
			"mac": "0", "groups": []any{"default", "web"}, "devices": map[string]any{"ami": "sda1", "root": "/dev/sda1", "ephemeral0": "sdb"},
			"tags": map[string]any{"Name": "web one", "tier": "front"},
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.platform, d)
		}
		if log := s.log(t); strings.Contains(log, `"status":404`) && c.platform == "aws" {
			for line := range strings.Lines(log) {
				if strings.Contains(line, `"status":404`) && !strings.Contains(line, "/user-data") {
					t.Errorf("a name that cloud-init took from a listing was not there: %s", line)
				}
			}
		}
	}
}

// bootScript makes a chroot over this machine's root, on which everything
// written goes to memory, and boots cloud-init in it for the first time.
const bootScript = `
set -e
deb=$1 root=$2 platform=$3
mount -t tmpfs none "$root"
mkdir "$root/upper" "$root/work" "$root/root"
cp -a "$deb" "$root/deb" # a lower layer must not lie inside another
for d in bin sbin lib; do # nor hide a link of the merged /usr
  if [ -L "/$d" ] && [ -d "$root/deb/$d" ]; then
    mkdir -p "$root/deb/usr/$d"; cp -a "$root/deb/$d/." "$root/deb/usr/$d/"; rm -r "$root/deb/$d"
  fi
done
mount -t overlay overlay -o "lowerdir=$root/deb:/,upperdir=$root/upper,workdir=$root/work" "$root/root"
cd "$root/root"
mount -t proc proc proc
mount -t tmpfs none sys; mount -t tmpfs none run; mount -t tmpfs none tmp
mount --rbind /dev dev
mkdir -p sys/class/dmi/id sys/class/net sys/class/block
if [ "$platform" = aws ]; then
  for f in product_uuid product_serial; do echo ec2e1916-9099-7caf-fd21-012345abcdef >sys/class/dmi/id/$f; done
fi
# In a container cloud-init would not look at the firmware.
rm -f usr/bin/systemd-detect-virt; printf '#!/bin/sh\nexit 1\n' >usr/bin/systemd-detect-virt; chmod 755 usr/bin/systemd-detect-virt
rm -rf root/.ssh var/lib/cloud var/lib/user-data-ran etc/ssh/ssh_host_*
mkdir -p etc/cloud/cloud.cfg.d
cat >etc/cloud/cloud.cfg.d/99-test.cfg <<E
datasource_list: [Ec2]
datasource: {Ec2: {strict_id: false, max_wait: 20, timeout: 4}}
network: {config: disabled}
apt: {preserve_sources_list: true}
manage_etc_hosts: false
locale: false
E
hostname before
for stage in init "modules --mode=config" "modules --mode=final"; do
  chroot . /usr/bin/python3 /usr/bin/cloud-init $stage >run/stage.log 2>&1 || { cat run/stage.log; grep -B2 -A25 -m3 -E 'WARNING|Traceback' var/log/cloud-init.log; exit 1; }
done
show() { echo "== $1"; cat "$2" 2>/dev/null || echo absent; }
echo "== hostname"; hostname
show instance-id var/lib/cloud/data/instance-id
show user-data-ran var/lib/user-data-ran
show debian home/debian/.ssh/authorized_keys
show result run/cloud-init/result.json
grep -c Traceback var/log/cloud-init.log >tmp/n || true
echo "== tracebacks"; cat tmp/n
`

// TestCloudInitBoot is a first boot: keys, hostname, instance id and the
// user-data script end up where they belong.
func TestCloudInitBoot(t *testing.T) {
	dir := unpack(t, "cloud-init")
	for _, c := range []struct{ platform, extra string }{{"unknown", ""}, {"aws", tokensRequired}} {
		s := cloud(t, c.extra)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		// The parent directories of the new root must not be inside it.
		out, err := s.ns.command(ctx, nil, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", bootScript, "-", dir, t.TempDir(), c.platform).CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("%s: %v\n%s", c.platform, err, tail(string(out)))
		}
		sections := make(map[string]string)
		for part := range strings.SplitSeq(string(out), "== ") {
			name, body, _ := strings.Cut(part, "\n")
			sections[name] = body
		}
		for name, want := range map[string]string{
			"hostname": "web-1\n", "instance-id": "i-0abc1234def567890\n", "user-data-ran": "web-1\nmore\n",
			"debian": sshKey + "\n" + sshKey + "-too", "tracebacks": "0\n",
		} {
			if name == "debian" { // cloud-init keeps keys in a set
				lines := strings.Fields(strings.ReplaceAll(strings.TrimSpace(sections[name]), " ", "\x00"))
				slices.Sort(lines)
				sections[name] = strings.ReplaceAll(strings.Join(lines, "\n"), "\x00", " ")
			}
			if sections[name] != want {
				t.Errorf("%s: %s is %q, want %q", c.platform, name, sections[name], want)
			}
		}
		if !strings.Contains(sections["result"], "DataSourceEc2") || !strings.Contains(sections["result"], `"errors": []`) {
			t.Errorf("%s: result %s", c.platform, sections["result"])
		}
		_, err = os.Stat("/var/lib/user-data-ran")
		if err == nil {
			t.Fatal("the user data ran on this machine")
		}
		t.Logf("%s: %d requests", c.platform, strings.Count(s.log(t), "\n"))
	}
}
