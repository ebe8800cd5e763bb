package boot_test

import (
	"crypto/rsa"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/launch"
	"github.com/instar-image/instar/metadata/sts"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
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
	return cloudWithLaunch(t, b.cloud, l, valid)
}

// cloudWithLaunch starts a metadata server that gives tickets for an image.
func cloudWithLaunch(t testing.TB, key *rsa.PrivateKey, l *metadata.Launch, valid time.Duration) (params string, log *requests) {
	t.Helper()
	if l.Credentials.STS != nil {
		l.Credentials.STS.CACert = l.CACert
	}
	set, err := metadata.NewSet(&metadata.Instance{
		ID: "i-1", Hostname: "booted", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Metadata: metadata.MetadataOptions{Tokens: "required"}, Launch: l,
	})
	must(t, err)
	state := metadata.NewState()
	launcher, err := launch.New(launch.Options{State: state, Keys: metadata.NewKeyRing(sts.Minter{}), EC2Key: key, Valid: valid})
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
	t.Run("Instar image, session credentials", func(t *testing.T) {
		t.Parallel()
		s := servers.MinIO(t)
		bucket := s.Bucket(t)
		objects, err := upload.Open(t.Context(), "s3://"+bucket+"/store", upload.Options{
			Endpoint: s.Endpoint, Region: s.Region, Credentials: &upload.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey},
		})
		must(t, err)
		defer objects.Close()
		f, err := os.Open(image)
		must(t, err)
		defer f.Close()
		m, err := sparse.Scan(int(f.Fd()), 64<<20)
		must(t, err)
		c := boot.Capture(t, objects, f, 64<<20, m)
		params, log := cloudWithLaunch(t, nil, &metadata.Launch{
			Format: "instar", Store: "s3://" + bucket + "/store", Endpoint: s.Endpoint, Region: s.Region,
			Manifest: c.Manifest, ManifestSHA256: c.Name, Signers: c.Signers, IndexKey: c.Identity,
			Credentials: metadata.Credentials{STS: &metadata.STS{Endpoint: s.Endpoint, Region: s.Region, AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey, Duration: metadata.Duration(time.Hour)}},
		}, 0)
		p := &proxy{}
		g := guest(params + fmt.Sprintf("instar.proxy=http://10.0.2.2:%d", p.serve(t)))
		out := qemutest.Run(t, g, nil)
		inOrder(t, out, `root: web [0-9a-f]{8}, 64 MiB, for /dev/vda`, `root: \d+ KiB written, all`, `root: /dev/vda, ext4 11111111`, `root: grown from`, `inject: hostname booted`, `GUEST done`)
		if got := log.all(); got != "200 launch: claimed\n204 launch: completed" {
			t.Errorf("the metadata server's log: %s", got)
		}
		before := p.count.Load()
		inOrder(t, qemutest.Run(t, g, nil), `it is this instance's already`, `GUEST done`)
		if p.count.Load() != before {
			t.Error("the second boot fetched something")
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
