package boot_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/launch"
	"github.com/instar-image/instar/metadata/sts"
	"github.com/instar-image/instar/test/servers"
)

// requests notes what the metadata server says of requests for tickets.
type requests struct {
	mu    sync.Mutex
	notes []string
}

func (r *requests) Request(q *metadata.Request) {
	if strings.Contains(q.Path, "instar") {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.notes = append(r.notes, fmt.Sprintf("%d %s", q.Status, q.Note))
	}
}

func (r *requests) all() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.notes, "\n")
}

// cloudWithStore uploads a bundle to a server and starts the metadata server
// whose launcher gives tickets for it.
func cloudWithStore(t testing.TB, s *servers.Server, b *stored, creds metadata.Credentials, valid time.Duration) (params string, log *requests) {
	t.Helper()
	bucket := s.Bucket(t)
	for name, data := range b.parts {
		s.Put(t, bucket, "images/web/"+name, data)
	}
	s.Put(t, bucket, "images/web/small.manifest.xml", b.manifest)
	l := &metadata.Launch{
		Format: "ec2", Store: "s3://" + bucket + "/images", Endpoint: s.Endpoint, Region: s.Region, Manifest: "web/small.manifest.xml",
		Certificate: string(b.cert), Credentials: creds,
	}
	if s.CACert != "" {
		ca, err := os.ReadFile(s.CACert)
		must(t, err)
		l.CACert = string(ca)
	}
	if creds.STS != nil {
		policy, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": []any{map[string]any{
			"Effect": "Allow", "Action": []string{"s3:GetObject"}, "Resource": []string{"arn:aws:s3:::" + bucket + "/images/web/*"},
		}}})
		must(t, err)
		creds.STS.Policy, creds.STS.CACert = string(policy), l.CACert
	}
	set, err := metadata.NewSet(&metadata.Instance{
		ID: "i-1", Hostname: "booted", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Metadata: metadata.MetadataOptions{Tokens: "required"}, Launch: l,
	})
	must(t, err)
	state := metadata.NewState()
	launcher, err := launch.New(launch.Options{State: state, Keys: metadata.NewKeyRing(sts.Minter{}), EC2Key: b.cloud, Valid: valid})
	must(t, err)
	log = &requests{}
	h, err := metadata.New(metadata.Options{Source: metadata.Static(set), State: state, Launcher: launcher, Reporter: log, AnyPort: true})
	must(t, err)
	return fmt.Sprintf("instar.metadata=http://10.0.2.2:%d instar.root=ticket instar.anyport ", port(t, "127.0.0.1:0", h)), log
}

// TestBootStore boots from MinIO with tickets of the real launcher.
func TestBootStore(t *testing.T) {
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5})
	image := smallRoot(t)
	guest := func(params string, more ...string) qemutest.Guest {
		return qemutest.Guest{Kernel: kernel, Initrd: file, Append: params, Args: append(append(qemutest.UserNet(), qemutest.Disk(dirty(t))...), more...)}
	}
	// The store is at 127.0.0.1 for the metadata server, and by way of the
	// proxy for the machine.
	t.Run("session credentials, private CA, proxy, clock ten years off, MBR", func(t *testing.T) {
		t.Parallel()
		s := servers.MinIOTLS(t)
		params, log := cloudWithStore(t, s, partitioned(t, disk.MBR, image), metadata.Credentials{STS: &metadata.STS{
			Endpoint: s.Endpoint, Region: s.Region, AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey, Duration: metadata.Duration(time.Hour),
		}}, 0)
		p := &proxy{}
		out := qemutest.Run(t, guest(params+fmt.Sprintf("instar.proxy=http://10.0.2.2:%d", p.serve(t)), "-rtc", "base=2016-01-01T00:00:00"), nil)
		inOrder(t, out, `clock set to`, `root: small, 65 MiB in \d+ parts, for /dev/vda`, `root: /dev/vda1, ext4 11111111`, `inject: hostname booted`, `GUEST done`)
		if p.bytes.Load() < 500_000 {
			t.Errorf("only %d bytes came by way of the proxy", p.bytes.Load())
		}
		if got := log.all(); got != "200 launch: claimed\n204 launch: completed" {
			t.Errorf("the metadata server's log: %s", got)
		}
	})
	t.Run("URLs that expire, GPT", func(t *testing.T) {
		t.Parallel()
		s := servers.MinIO(t)
		params, log := cloudWithStore(t, s, partitioned(t, disk.GPT, image), metadata.Credentials{Static: &metadata.StaticKeys{
			AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey,
		}}, 20*time.Second)
		p := &proxy{hold: func(n int32) {
			if n == 5 {
				time.Sleep(21 * time.Second) // until the URL is no longer good
			}
		}}
		out := qemutest.Run(t, guest(params+fmt.Sprintf("instar.proxy=http://10.0.2.2:%d", p.serve(t))), nil)
		inOrder(t, out, `root: small, 67 MiB in \d+ parts, for /dev/vda`, `part small\.part\.\d+: the store refuses the ticket's URL or credentials \(403 Forbidden\); trying again`,
			`root: /dev/vda1, ext4 11111111`, `inject: hostname booted`, `GUEST done`)
		if strings.Contains(out, "X-Amz-") {
			t.Error("the console shows a presigned URL")
		}
		inOrder(t, log.all(), `200 launch: claimed`, `200 launch: renewed \(1\)`, `204 launch: completed`)
	})
}
