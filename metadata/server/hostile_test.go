package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/dirsource"
	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/freeport"
)

// raw sends bytes on a connection of its own and returns everything that
// comes back: answers, as many as are wanted, and what follows them until the
// server closes the connection or says nothing for half a second.
func raw(t *testing.T, addr, text string, answers int) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go io.WriteString(c, text) // the server may close before it has read all
	var out strings.Builder
	buf := make([]byte, 64<<10)
	for {
		patience := time.Minute // a busy machine may take its time
		if strings.Count(out.String(), "HTTP/1.") >= answers {
			patience = 500 * time.Millisecond
		}
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			return out.String()
		}
	}
}

func TestHostileRequests(t *testing.T) {
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, record("i-1", "127.0.0.1"), record("i-2", "127.0.0.2"))}})
	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: x.invalid\r\nHost: y\r\n\r\n" }
	const host = "Host: 169.254.169.254\r\n"
	for _, c := range []struct{ name, text, want string }{
		{"a header of 64 KiB", "GET / HTTP/1.1\r\n" + host + "X: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "HTTP/1.1 431 "},
		{"10,000 header lines", "GET / HTTP/1.1\r\n" + host + strings.Repeat("X: y\r\n", 10_000) + "\r\n", "HTTP/1.1 431 "},
		{"a URL of 8 KiB", "GET /" + strings.Repeat("x", 8<<10) + " HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"a URL of 64 KiB", "GET /" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 431 "},
		{"two hosts", get("/"), "HTTP/1.1 400 "},
		{"no host", "GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		{"no host in HTTP/1.0", "GET " + instanceID + " HTTP/1.0\r\n\r\n", "HTTP/1.0 200 "},
		{"nonsense", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 "},
		{"HTTP/0.9", "GET /\r\n\r\n", "HTTP/1.1 400 "},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 405 "},
		{"a header name with a space", "GET / HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token : x\r\n\r\n", "HTTP/1.1 400 "},
		{"a folded header", "GET " + instanceID + " HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token:\r\n x\r\n\r\n", "HTTP/1.1 4"},
		{"two lengths", "GET / HTTP/1.1\r\n" + host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nx", "HTTP/1.1 400 "},
		{"a negative length", "GET / HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n", "HTTP/1.1 400 "},
		{"an unknown coding", "GET / HTTP/1.1\r\n" + host + "Transfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 501 "},
		{"dots", "GET /latest/../latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"encoded dots", "GET /latest/%2e%2e/latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"a NUL", "GET /latest/meta-data/instance-id%00 HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"an overlong slash", "GET /latest%c0%afmeta-data/instance-id HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"a broken escape", "GET /latest/%zz HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 400 "},
		{"backslashes", `GET /latest\meta-data\instance-id HTTP/1.1` + "\r\n" + host + "\r\n", "HTTP/1.1 404 "},
		{"an absolute URL", "GET http://169.254.169.254" + instanceID + " HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 200 "},
		{"an absolute URL elsewhere", "GET http://rebound.example" + instanceID + " HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 421 "},
		{"CONNECT", "CONNECT 127.0.0.2:80 HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 405 "},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n", "HTTP/1.1 405 "},
		{"Expect", "PUT /latest/api/token HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nContent-Length: 0\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\n\r\n", "HTTP/1.1 200 "},
		{"a chunked empty body", "PUT /latest/api/token HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\n\r\n0\r\n\r\n", "HTTP/1.1 200 "},
	} {
		got := raw(t, s.addr, c.text, 1)
		if !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %.100q, want %q", c.name, got, c.want)
		}
		if strings.Contains(got, "i-2") {
			t.Errorf("%s: another instance's id", c.name)
		}
	}

	const next = "GET " + instanceID + " HTTP/1.1\r\n" + host + "\r\n"
	for name, text := range map[string]string{
		"length and chunks":        "GET / HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + next,
		"a request in a body":      fmt.Sprintf("GET / HTTP/1.1\r\n"+host+"Content-Length: %d\r\n\r\n", len(next)) + next,
		"a request after a body":   "GET / HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\nx" + next,
		"a request after a token":  "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 1\r\n\r\n" + next,
		"a request after a chunk":  "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n" + next,
		"a request after HTTP/1.0": "GET / HTTP/1.0\r\n\r\n" + next,
	} {
		got := raw(t, s.addr, text, 1)
		if n := strings.Count(got, "HTTP/1."); n != 1 {
			t.Errorf("%s: %d answers: %.300q", name, n, got)
		}
	}
	if got := raw(t, s.addr, strings.Repeat(next, 100), 100); strings.Count(got, "HTTP/1.1 200 ") != 100 {
		t.Errorf("100 requests at once: %d answers", strings.Count(got, "HTTP/1.1 200 "))
	}
}

// TestSlowConnections has 1,000 connections that send a byte now and then: from
// instances, from one that takes more than its share by many addresses, and
// from nobody's addresses. Instances that behave are served all the time, and
// the slow ones are cut off.
func TestSlowConnections(t *testing.T) {
	const header, share, strangers = 5 * time.Second, 10, 50
	instances := []*metadata.Instance{record("i-1", "127.0.0.1"), record("i-greedy", "127.7.255.1")}
	for i := range 200 {
		instances[1].Caller.Addresses = append(instances[1].Caller.Addresses, netip.AddrFrom4([4]byte{127, 7, 254, byte(i)}))
	}
	for i := range 90 {
		instances = append(instances, record(fmt.Sprintf("i-slow%d", i), fmt.Sprintf("127.7.0.%d", i+1)))
	}
	admin := freeport.Address(freeport.Port(t))
	s := start(t, Options{
		Metadata: metadata.Options{Source: source(t, instances...)},
		Limits:   Limits{Header: header, PerInstance: share, Strangers: strangers, Connections: 2000}, Admin: admin,
	})
	var slow sync.WaitGroup
	cut := make(chan error, 1100)
	opened := make(chan struct{}, 1100)
	for i := range 1100 {
		slow.Go(func() {
			from := net.IPv4(127, 7, 0, byte(i%90+1)) // ten of each of 90 instances
			if i >= 1000 {
				from = net.IPv4(127, 7, 254, byte(i-1000)) // the greedy one
			} else if i >= 900 {
				from = net.IPv4(127, 7, 100, byte(i-900)) // nobody's
			}
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
			c, err := d.Dial("tcp", s.addr)
			opened <- struct{}{}
			if err != nil {
				cut <- err
				return
			}
			defer c.Close()
			for b := range []byte("GET / HTTP/1.1\r\nX-" + strings.Repeat("x", 200)) {
				if _, err := c.Write([]byte{byte('a' + b%26)}); err != nil {
					cut <- err
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
			cut <- nil
		})
	}
	for range 1100 {
		<-opened
	}
	for range 200 {
		if code, body := s.get(t, "GET", instanceID); code != 200 || body != "i-1" {
			t.Fatalf("beside slow connections: %d %q", code, body)
		}
	}
	slow.Wait()
	for range 1100 {
		if err := <-cut; err == nil {
			t.Fatal("a slow connection was let send its whole header")
		}
	}
	// Beyond their shares, connections were not even taken.
	res, err := s.client.Get("http://" + admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "\ninstar_metadata_connections_refused_total ")
	if n, err := strconv.Atoi(strings.SplitN(after, "\n", 2)[0]); err != nil || n < 100-share+100-strangers {
		t.Errorf("%d connections were turned away (%v), want %d at least", n, err, 100-share+100-strangers)
	}
}

// TestLongAnswer has an answer that takes longer than a request may: it is
// given all the same.
func TestLongAnswer(t *testing.T) {
	in := record("i-1", "127.0.0.1")
	in.Role = &metadata.Role{Name: "r", Credentials: metadata.Credentials{STS: &metadata.STS{Endpoint: "http://x", AccessKeyID: "a", SecretAccessKey: "s"}}}
	m := slowMinter{make(chan struct{}), make(chan struct{})}
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, in), Keys: metadata.NewKeyRing(m)}, Limits: Limits{Header: 2 * time.Second, Idle: 200 * time.Millisecond}})
	go func() {
		<-m.asked
		time.Sleep(3 * time.Second)
		close(m.mint)
	}()
	if code, body := s.get(t, "GET", "/latest/meta-data/iam/security-credentials/r"); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	// But a connection on which nothing more is asked is closed.
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET "+instanceID+" HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(b), "i-1") {
		t.Errorf("%q, %v", b, err)
	}
}

// TestBrokenBody announces a body that never comes: the connection is closed.
func TestBrokenBody(t *testing.T) {
	in := record("i-1", "127.0.0.1")
	in.Launch = &metadata.Launch{Format: "ec2", Store: "s3://b", Manifest: "m", Certificate: "x"}
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, in), AnyPort: true, Launcher: noLauncher{}}, Limits: Limits{Header: 2 * time.Second}})
	_, tok := s.get(t, "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60")
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "POST /latest/api/instar/launch HTTP/1.1\r\nHost: localhost\r\nX-aws-ec2-metadata-token: "+tok+"\r\nContent-Length: 100\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil && !errors.Is(err, syscall.ECONNRESET) || strings.Contains(string(b), " 200 ") {
		t.Errorf("%q, %v", b, err)
	}
}

type noLauncher struct{}

func (noLauncher) Claim(context.Context, *metadata.Instance, []byte) ([]byte, error) {
	return []byte("ticket"), nil
}
func (noLauncher) Complete(context.Context, *metadata.Instance, []byte) error { return nil }

// TestDeafConnection pipelines requests and reads no answer: it is cut off.
func TestDeafConnection(t *testing.T) {
	in := record("i-1", "127.0.0.1")
	in.UserData = make(metadata.Blob, metadata.MaxUserData)
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, in)}, Limits: Limits{Write: 500 * time.Millisecond}})
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	request := strings.Repeat("GET /latest/user-data HTTP/1.1\r\nHost: localhost\r\n\r\n", 100)
	if err := c.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := io.WriteString(c, request); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("the server still waits for a peer that reads nothing")
			}
			return
		}
	}
}

// TestReloads replaces the records 1,000 times while clients read: each answer
// is wholly of one version.
func TestReloads(t *testing.T) {
	dir := t.TempDir()
	write := func(n int) {
		c := string(rune('a' + n%26))
		text := fmt.Sprintf("instance-id: i-1\ncaller: {addresses: [127.0.0.1]}\nami-id: ami-%s\ninstance-type: %s\naccount-id: '%d'\nuser-data: %s\n",
			strings.Repeat(c, 8), strings.Repeat(c, 50), n, strings.Repeat(c, 16000))
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "x"), filepath.Join(dir, "a.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	d, err := dirsource.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, Options{Metadata: metadata.Options{Source: d}})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[string]bool)
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				code, data := s.get(t, "GET", "/latest/user-data")
				if code != 200 || len(data) != 16000 || strings.Trim(data, data[:1]) != "" {
					t.Errorf("a mixed answer: %d, %d bytes", code, len(data))
					return
				}
				_, doc := s.get(t, "GET", "/latest/dynamic/instance-identity/document")
				_, after, _ := strings.Cut(doc, `"imageId" : "ami-`)
				if len(after) < 8 || !strings.Contains(doc, `"instanceType" : "`+strings.Repeat(after[:1], 50)+`"`) {
					t.Errorf("a mixed document: %s", doc)
					return
				}
				mu.Lock()
				seen[data[:1]] = true
				mu.Unlock()
			}
		})
	}
	for n := range 1000 {
		write(n + 1)
		if err := d.Reload(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	t.Logf("1000 reloads, %d versions seen", len(seen))
	if len(seen) < 5 {
		t.Errorf("only %d versions were seen: the clients were not reading meanwhile", len(seen))
	}
}

// TestCrossTalk has 10,000 instances ask for 100,000 things, 1,000,000 if
// $INSTAR_EVIDENCE is set: each gets its own.
func TestCrossTalk(t *testing.T) {
	const instances, workers = 10_000, 16
	each := evidence.Cases(10, 100)
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, byte(100 + i>>16), byte(i >> 8), byte(i)}) }
	ins := make([]*metadata.Instance, instances)
	for i := range ins {
		ins[i] = record(fmt.Sprintf("i-%05d", i), addr(i).String())
		ins[i].UserData = metadata.Blob(fmt.Sprintf("data of %05d", i))
		ins[i].Interfaces = []metadata.Interface{{MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", i>>8, i&255), LocalIPv4s: []netip.Addr{addr(i)}}}
	}
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, ins...), Rate: 500}})
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				if err := visit(s.addr, addr(i), ins[i], each); err != nil {
					t.Errorf("instance %d: %v", i, err)
				}
			}
		})
	}
	for i := range instances {
		next <- i
	}
	close(next)
	wg.Wait()
	t.Logf("%d instances, %d requests", instances, instances*each)
}

// visit makes n requests as an instance.
func visit(server string, from netip.Addr, in *metadata.Instance, n int) error {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	ask := func(c net.Conn, r *bufio.Reader, request string) (string, error) {
		if _, err := io.WriteString(c, request); err != nil {
			return "", err
		}
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != 200 {
			err = errors.New(res.Status)
		}
		return string(b), err
	}
	const host = " HTTP/1.1\r\nHost: 169.254.169.254\r\n"
	c, err := d.Dial("tcp", server)
	if err != nil {
		return err
	}
	defer c.Close()
	token, err := ask(c, bufio.NewReader(c), "PUT /latest/api/token"+host+"X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n")
	if err != nil {
		return err
	}
	if c, err = d.Dial("tcp", server); err != nil { // the token's connection is closed
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for k := range n - 1 {
		path, want := instanceID, in.ID
		switch k % 3 {
		case 1:
			path, want = "/latest/user-data", string(in.UserData)
		case 2:
			path, want = "/2021-03-23/meta-data/network/interfaces/macs/"+in.Interfaces[0].MAC+"/local-ipv4s", from.String()
		}
		got, err := ask(c, r, "GET "+path+host+"X-aws-ec2-metadata-token: "+token+"\r\n\r\n")
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if got != want {
			return fmt.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	return nil
}
