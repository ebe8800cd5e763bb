package boot_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
)

// stored is a bundle in memory.
type stored struct {
	mu       sync.Mutex
	parts    map[string][]byte
	manifest []byte
	cert     []byte // PEM
	cloud    *rsa.PrivateKey
	key, iv  ec2.BlockKey
}

func (s *stored) PutPart(_ context.Context, p ec2.Part) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parts[p.Name] = bytes.Clone(p.Data)
	return nil
}

func certificate(t testing.TB, addresses ...net.IP) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IPAddresses: addresses}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return key, cert
}

// bundleOf bundles a disk image in many small parts.
func bundleOf(t testing.TB, disk string) *stored {
	t.Helper()
	f, err := os.Open(disk)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	m, err := sparse.Scan(int(f.Fd()), st.Size())
	must(t, err)
	return bundleImage(t, ec2.Image{Name: "small", Size: st.Size(), Map: m, Write: func(_ context.Context, w io.Writer) error {
		_, err := io.Copy(w, sparse.NewReader(f, m))
		return err
	}})
}

// partitioned bundles a filesystem image in a partition.
func partitioned(t testing.TB, kind disk.Kind, image string) *stored {
	t.Helper()
	f, err := os.Open(image)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	m, err := sparse.Scan(int(f.Fd()), st.Size())
	must(t, err)
	d, err := disk.Wrap(kind, st.Size(), m, [16]byte{1})
	must(t, err)
	return bundleImage(t, ec2.Image{Name: "small", Size: d.Size(), Map: d.Map(), Write: func(ctx context.Context, w io.Writer) error {
		return d.Write(ctx, w, func(w io.Writer) error {
			_, err := io.Copy(w, sparse.NewReader(f, m))
			return err
		})
	}})
}

func bundleImage(t testing.TB, image ec2.Image) *stored {
	t.Helper()
	key, cert := certificate(t)
	cloudKey, cloud := certificate(t)
	s := &stored{parts: make(map[string][]byte), cloud: cloudKey, cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})}
	rand.Read(s.key[:])
	rand.Read(s.iv[:])
	var err error
	_, s.manifest, err = ec2.Bundle(t.Context(), ec2.BundleOptions{
		Arch: "x86_64", Account: "111122223333", EC2Cert: cloud, UserCert: cert, Key: key, EncKey: &s.key, EncIV: &s.iv, PartSize: 64 << 10,
	}, image, s)
	must(t, err)
	if len(s.parts) < 8 {
		t.Fatalf("only %d parts: a cut in the middle means nothing", len(s.parts))
	}
	return s
}

// launcher is a cloud that gives out tickets for a bundle, whose parts it
// serves at URLs with a stamp that may expire.
type launcher struct {
	*stored
	t    testing.TB
	port int
	// tls is https, with a certificate for this address.
	tls string
	// change, if not nil, changes tickets; wrong answers requests for parts.
	change func(t *ticket.Ticket)
	wrong  func(w http.ResponseWriter, name string, n int) bool

	mu       sync.Mutex
	claims   int
	complete int
	asked    map[string]int
}

func (l *launcher) Claim(_ context.Context, in *metadata.Instance, body []byte) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.claims++
	_, to, err := ticket.ParseRequest(body)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(l.manifest)
	tk := &ticket.Ticket{
		Version: 1, InstanceID: in.ID, Format: "ec2", Store: "s3://bucket", Manifest: "small.manifest.xml", ManifestBytes: l.manifest,
		ManifestSHA256: hex.EncodeToString(sum[:]), Certificate: string(l.cert),
		Key: hex.EncodeToString(l.key[:]), IV: hex.EncodeToString(l.iv[:]), Objects: make(map[string]string),
	}
	for name := range l.parts {
		scheme := "http"
		if l.tls != "" {
			scheme = "https"
		}
		tk.Objects[name] = fmt.Sprintf(scheme+"://10.0.2.2:%d/%s?stamp=%d", l.port, name, l.claims)
	}
	if l.change != nil { // l's lock is held
		l.change(tk)
	}
	return tk.Seal(to)
}

func (l *launcher) Complete(context.Context, *metadata.Instance, []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.complete++
	return nil
}

func (l *launcher) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	l.mu.Lock()
	l.asked[name]++
	n := l.asked[name]
	data := bytes.Clone(l.parts[name])
	stale := r.URL.Query().Get("stamp") != fmt.Sprint(l.claims)
	wrong := l.wrong
	l.mu.Unlock()
	if stale {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	if wrong != nil && wrong(w, name, n) {
		return
	}
	w.Write(data)
}

// answer sets what answers instead.
func (l *launcher) answer(wrong func(w http.ResponseWriter, name string, n int) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = wrong
}

// times is how often a part was asked for.
func (l *launcher) times(part int) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, k := range l.asked {
		if number(l.t, name) == part {
			n += k
		}
	}
	return n
}

func (l *launcher) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.asked)
}

// number is a part's.
func number(t testing.TB, name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '.')+1:])
	must(t, err)
	return n
}

func (l *launcher) counts() (claims, complete, asked int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.asked {
		asked += n
	}
	return l.claims, l.complete, asked
}

// serve starts the metadata server and the store, and returns the kernel's
// parameters for them.
func (l *launcher) serve(t testing.TB, id string) string {
	t.Helper()
	l.t, l.asked = t, make(map[string]int)
	if l.tls != "" {
		s := httptest.NewUnstartedServer(l)
		key, cert := certificate(t, net.ParseIP(l.tls))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}}
		s.StartTLS()
		t.Cleanup(s.Close)
		l.port = s.Listener.Addr().(*net.TCPAddr).Port
	} else {
		l.port = port(t, "127.0.0.1:0", l)
	}
	set, err := metadata.NewSet(&metadata.Instance{
		ID: id, Hostname: "booted", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Metadata: metadata.MetadataOptions{Tokens: "required"},
		Launch:   &metadata.Launch{Format: "ec2", Store: "s3://bucket", Manifest: "small.manifest.xml", Certificate: string(l.cert)},
	})
	must(t, err)
	h, err := metadata.New(metadata.Options{Source: metadata.Static(set), Launcher: l, AnyPort: true})
	must(t, err)
	return fmt.Sprintf("instar.metadata=http://10.0.2.2:%d instar.root=ticket instar.anyport ", port(t, "127.0.0.1:0", h))
}

// dirty is a disk of 96 MiB full of what an earlier owner left.
func dirty(t testing.TB) string {
	t.Helper()
	name := blank(t)
	must(t, os.WriteFile(name, bytes.Repeat([]byte("left by an earlier owner "), 96<<20/25), 0o600))
	must(t, os.Truncate(name, 96<<20))
	return name
}

// headIsEmpty tells whether nothing on the disk can be mounted: there is
// nothing in its beginning but Instar's record.
func headIsEmpty(t testing.TB, disk string) bool {
	t.Helper()
	f, err := os.Open(disk)
	must(t, err)
	defer f.Close()
	b := make([]byte, 1<<20)
	_, err = io.ReadFull(f, b)
	must(t, err)
	if !bytes.HasPrefix(b, []byte("instar root v1")) {
		t.Error("there is no record on the disk")
	}
	return len(bytes.Trim(b[440:], "\x00")) == 0
}

func inOrder(t testing.TB, out string, want ...string) {
	t.Helper()
	rest := out
	for _, w := range want {
		at := regexp.MustCompile(w).FindStringIndex(rest)
		if at == nil {
			t.Fatalf("the console lacks, in its order, %q:\n%s", w, out)
		}
		rest = rest[at[1]:]
	}
}

// TestBootTicket writes a bundle over a dirty disk while the store misbehaves,
// has its power cut in the middle, and goes on.
func TestBootTicket(t *testing.T) {
	t.Parallel()
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5})
	image := smallRoot(t)
	l := &launcher{stored: bundleOf(t, image)}
	params := l.serve(t, "i-1")
	disk := dirty(t)
	guest := qemutest.Guest{Kernel: kernel, Initrd: file, Append: params, Args: append(qemutest.UserNet(), qemutest.Disk(disk)...)}

	// cutAt boots until a part is asked for, which does not come; then the
	// power goes. Two parts that are asked for before it may be under way too.
	cutAt := func(part int) string {
		hold, asked := make(chan struct{}), make(chan struct{})
		var once sync.Once
		l.answer(func(w http.ResponseWriter, name string, _ int) bool {
			if number(t, name) != part {
				return false
			}
			once.Do(func() { close(asked) })
			<-hold
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		})
		out := qemutest.RunUntil(t, guest, asked, nil)
		close(hold)
		if !headIsEmpty(t, disk) {
			t.Fatal("after a power cut there is something to boot on the disk")
		}
		return out
	}
	last := len(l.parts) - 1
	cutAt(4)
	l.forget()
	inOrder(t, cutAt(last), `root: resuming: \d+ KiB of \d+, [2-4] parts, are on the disk already`)
	for _, part := range []int{0, 1} {
		if n := l.times(part); n != 0 {
			t.Errorf("part %d was fetched again after the first cut", part)
		}
	}
	l.forget()

	// Now the store fails, lies and lets URLs expire once each, and all is well.
	failures := 0
	l.answer(func(w http.ResponseWriter, name string, _ int) bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		failures++
		switch failures {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 2:
			w.Write(bytes.Repeat([]byte("lies"), len(l.parts[name])/4))
		case 3:
			w.Header().Set("Content-Length", "1000000")
			w.Write([]byte("cut short"))
		case 4:
			l.claims++ // as if the URLs had expired
			w.WriteHeader(http.StatusForbidden)
		default:
			return false
		}
		return true
	})
	out := qemutest.Run(t, guest, nil)
	inOrder(t, out, `root: small, 64 MiB in \d+ parts, for /dev/vda`, `root: resuming: \d+ KiB of \d+, \d+ parts, are`, `KiB fetched, \d+ from the disk`, `root: /dev/vda, ext4 11111111`, `root: grown from`, `inject: hostname booted`, `GUEST done`)
	for part := range last - 2 {
		if n := l.times(part); n != 0 {
			t.Errorf("part %d was fetched again after the second cut", part)
		}
	}
	for _, want := range []string{`503`, `not those of the manifest`, `refuses the ticket's URL`} {
		if !regexp.MustCompile(`part small\.part\.\d+: .*` + want).MatchString(out) {
			t.Errorf("the console does not tell of %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "stamp=") || strings.Contains(out, hex.EncodeToString(l.key[:])) {
		t.Error("the console shows a presigned URL or the bundle's key")
	}
	if _, complete, _ := l.counts(); complete != 1 {
		t.Errorf("the ticket was completed %d times", complete)
	}
	holes(t, image, disk)

	// The next boot of the instance fetches nothing and asks for no ticket.
	claims, _, asked := l.counts()
	out = qemutest.Run(t, guest, nil)
	inOrder(t, out, `it is this instance's already`, `GUEST done`)
	if c, _, a := l.counts(); c != claims || a != asked {
		t.Errorf("second boot: %d claims and %d parts more", c-claims, a-asked)
	}

	// Another instance does not overwrite that disk unasked.
	other := &launcher{stored: l.stored}
	guest.Append = other.serve(t, "i-2")
	out = qemutest.Run(t, guest, nil)
	inOrder(t, out, `FAILED root: .*/dev/vda holds a ext4 filesystem: it is overwritten only if instar\.disk=`, `powering off`)
}

// holes checks that what is a hole in the image is zero on the disk.
func holes(t testing.TB, image, disk string) {
	t.Helper()
	a, err := os.Open(image)
	must(t, err)
	defer a.Close()
	b, err := os.Open(disk)
	must(t, err)
	defer b.Close()
	left := []byte("earlier owner")
	buf := make([]byte, 64<<20)
	_, err = io.ReadFull(b, buf)
	must(t, err)
	if at := bytes.Index(buf, left); at >= 0 {
		t.Errorf("what was on the disk before is still there within the image, at byte %d", at)
	}
}

// TestBootTicketRefused boots with images that must not be booted.
func TestBootTicketRefused(t *testing.T) {
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5})
	bundle := bundleOf(t, smallRoot(t))
	for _, c := range []struct {
		name, want string
		l          *launcher
		disk       func(testing.TB) string
	}{
		{"store's CA unknown", `FAILED root: .*the store's certificate is not trusted: .*x509: .*: is its CA in the ticket or the initrd\?`, &launcher{tls: "10.0.2.2"}, dirty},
		{"store's certificate is another's", `FAILED root: .*the store's certificate: .*x509: certificate is valid for 192\.0\.2\.7, not 10\.0\.2\.2`, &launcher{tls: "192.0.2.7"}, dirty},
		{"disk too small", `FAILED root: /dev/vda has 33554432 bytes, the image 67108864`, &launcher{}, func(t testing.TB) string {
			name := blank(t)
			must(t, os.Truncate(name, 32<<20))
			return name
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.l.stored = bundle
			disk := c.disk(t)
			out := qemutest.Run(t, qemutest.Guest{
				Kernel: kernel, Initrd: file, Append: c.l.serve(t, "i-1"), Args: append(qemutest.UserNet(), qemutest.Disk(disk)...),
			}, nil)
			inOrder(t, out, c.want, `powering off`)
			if strings.Contains(out, "GUEST") {
				t.Error("it was booted")
			}
		})
	}
	t.Run("one after the other", func(t *testing.T) {
		t.Parallel()
		_, stranger := certificate(t)
		l := &launcher{stored: bundle}
		disk := dirty(t)
		params := l.serve(t, "i-1")
		give := func(change func(*ticket.Ticket), wrong func(w http.ResponseWriter, name string, _ int) bool) func() {
			return func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.change, l.wrong = change, wrong
			}
		}
		out := stages(t, qemutest.Guest{
			Kernel: kernel, Initrd: file, Append: params + "instar.fail=retry instar.pause=1", Args: append(qemutest.UserNet(), qemutest.Disk(disk)...),
		}, []stage{
			{`FAILED root: launch ticket: .*signature`, give(func(tk *ticket.Ticket) {
				tk.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.Raw}))
			}, nil)},
			{`FAILED root: reading the launch ticket: its manifest is not the one whose digest it names`, give(func(tk *ticket.Ticket) {
				tk.ManifestSHA256 = strings.Repeat("0", 64)
			}, nil)},
			{`FAILED root: launch ticket: its image is of format "floppy"`, give(func(tk *ticket.Ticket) { tk.Format = "floppy" }, nil)},
			{`FAILED root: .*part small\.part\.\d+: it is not in the store \(404\)`, give(nil, func(w http.ResponseWriter, _ string, _ int) bool {
				w.WriteHeader(http.StatusNotFound)
				return true
			})},
			{`FAILED root: .*part small\.part\.\d+, tried 8 times: its bytes are not those`, give(nil, func(w http.ResponseWriter, name string, _ int) bool {
				if !strings.HasSuffix(name, "1") {
					return false
				}
				w.Write([]byte("x"))
				return true
			})},
			{`FAILED root: .*part small\.part\.\d+, tried 8 times: the store closed the connection`, give(nil, func(w http.ResponseWriter, _ string, _ int) bool {
				if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
					conn.Close()
				}
				return true
			})},
			{`FAILED root: writing the root to /dev/vda: `, give(func(tk *ticket.Ticket) { tk.Key = strings.Repeat("00", 16) }, nil)},
		})
		if strings.Contains(out, "GUEST") {
			t.Error("it was booted")
		}
		if !headIsEmpty(t, disk) {
			t.Error("there is something to boot on the disk")
		}
	})
}

// TestBootSlowStore boots from a store that gives one part by and by, and once
// stops in the middle of another.
func TestBootSlowStore(t *testing.T) {
	t.Parallel()
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff})
	stop := make(chan struct{})
	l := &launcher{stored: bundleOf(t, smallRoot(t))}
	l.wrong = func(w http.ResponseWriter, name string, n int) bool {
		data := l.parts[name]
		switch number(t, name) {
		case 1:
			for len(data) > 0 {
				k := min(len(data), 8<<10)
				w.Write(data[:k])
				w.(http.Flusher).Flush()
				data = data[k:]
				time.Sleep(time.Second)
			}
			return true
		case 3:
			if n > 1 {
				return false
			}
			w.Write(data[:len(data)/2])
			w.(http.Flusher).Flush()
			<-stop
			return true
		}
		return false
	}
	params := l.serve(t, "i-1")
	t.Cleanup(func() { close(stop) }) // before the server is closed, which waits for it
	out := qemutest.Run(t, qemutest.Guest{
		Kernel: kernel, Initrd: file, Append: params, Args: append(qemutest.UserNet(), qemutest.Disk(dirty(t))...),
	}, nil)
	inOrder(t, out, `part small\.part\.0?3: the store sent nothing for 30s; trying again`, `root: /dev/vda, ext4`, `GUEST done`)
	if strings.Contains(out, "part.1:") || strings.Contains(out, "part.01:") {
		t.Error("a part that came slowly was given up")
	}
}
