package metadata

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// TestDecodeProblems gives broken records; each must name the line and say why.
func TestDecodeProblems(t *testing.T) {
	const head = "instance-id: i-1\ncaller: {addresses: [10.0.0.1]}\n"
	key := "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEX0n5xXGLzC5c5hTLsRzAbY2TrFwgsFUZzn2kP4yZcA a"
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", head + "hostnam: x\n", "f:3: "},
		{"unknown key below", head + "placement:\n  availability-zone: a\n  zone: b\n", "f:5: "},
		{"key twice", head + "hostname: a\nhostname: b\n", "f:4: "},
		{"not a map", "- a\n", "f:1: "},
		{"not YAML", head + "a: [\n", "f:"},
		{"tab", head + "\thostname: a\n", "f:3: "},
		{"no id", "caller: {addresses: [10.0.0.1]}\n", "f:1: instance-id"},
		{"bad id", "caller: {addresses: [10.0.0.1]}\n\ninstance-id: ../x\n", "f:3: instance-id"},
		{"no caller", "instance-id: i-1\n", "f:1: caller: nothing says"},
		{"bad address", "instance-id: i-1\ncaller:\n  addresses:\n  - 10.0.0.1\n  - 10.0.0.256\n", "f:5: "},
		{"any address", "instance-id: i-1\ncaller:\n  addresses:\n  - 10.0.0.1\n  - 0.0.0.0\n", `f:5: caller.addresses[1]: "0.0.0.0"`},
		{"bad mac", head + "interfaces:\n- mac: 02:00:00:00:00:01\n- mac: nonsense\n", "f:5: interfaces[1].mac"},
		{"same mac", head + "interfaces:\n- mac: 02:00:00:00:00:0a\n- mac: 02:00:00:00:00:0A\n", "f:5: interfaces[1].mac"},
		{"v6 in v4", head + "interfaces:\n- mac: 02:00:00:00:00:0a\n  local-ipv4s:\n  - 2001:db8::1\n", "f:6: interfaces[0].local-ipv4s[0]"},
		{"bad tokens", head + "metadata-options:\n  http-tokens: maybe\n", "f:4: metadata-options.http-tokens"},
		{"hop limit", head + "metadata-options:\n  http-put-response-hop-limit: 65\n", "f:4: metadata-options.http-put"},
		{"key name", head + "public-keys:\n- name: a=b\n  key: " + key + "\n", "f:4: public-keys[0].name"},
		{"key names", head + "public-keys:\n- name: a\n  key: " + key + "\n- name: a\n  key: " + key + "\n", "f:6: public-keys[1].name"},
		{"key lines", head + "public-keys:\n- name: a\n  key: |\n    " + key + "\n    " + key + "\n", "f:5: public-keys[0].key"},
		{"private key", head + "public-keys:\n- name: a\n  key: -----BEGIN OPENSSH PRIVATE KEY----- x\n", "f:5: public-keys[0].key: this is a private key"},
		{"newline", head + "hostname: \"a\\nb\"\n", "f:3: hostname"},
		{"tag", head + "metadata-options: {instance-metadata-tags: enabled}\ntags: {a/b: c}\n", "f:4: tags"},
		{"tag like a key", head + "metadata-options: {instance-metadata-tags: enabled}\ntags: {0=x: c}\n", "f:4: tags"},
		{"two user data", head + "user-data: a\nuser-data-base64: Yg==\n", "f:4: user-data-base64"},
		{"not base64", head + "user-data-base64: '%%'\n", "f:3: user-data-base64"},
		{"much user data", head + "user-data: " + strings.Repeat("x", MaxUserData+1) + "\n", "f:3: user-data: 16385 bytes"},
		{"user data file", head + "user-data-file: /etc/passwd\n", "f:3: user-data-file"},
		{"credentials file", head + "role:\n  name: r\n  file: /etc/shadow\n", "f:3: role: this source of records may not"},
		{"no credentials", head + "role:\n  name: r\n", "f:3: role: give exactly one"},
		{"two credentials", head + "role:\n  name: r\n  static: {access-key-id: a, secret-access-key: b}\n  file: x\n", "f:3: role: give exactly one"},
		{"role name", head + "role:\n  name: a/b\n  static: {access-key-id: a, secret-access-key: b}\n", "f:4: role.name"},
		{"spot", head + "events:\n  spot: {action: explode, time: 2026-01-01T00:00:00Z}\n", "f:4: events.spot.action"},
		{"lifecycle", head + "events:\n  target-lifecycle-state: Gone\n", "f:4: events.target-lifecycle-state"},
		{"cache", head + "launch:\n  format: instar\n  store: s3://b/p\n  manifest: m\n  manifest-sha256: " + strings.Repeat("a", 64) + "\n  cache: unix:/x\n", "launch.cache"},
		{"ticket", head + "launch:\n  format: ec2\n  store: s3://b/p\n  manifest: m\n", "f:3: launch.certificate"},
		{"sts", head + "role:\n  name: r\n  sts:\n    endpoint: ftp://x\n    access-key-id: a\n    secret-access-key: b\n", "f:6: role.sts.endpoint"},
		{"too large", head + strings.Repeat("#", 300<<10), "f:1: "},
	} {
		_, err := Decode("f", []byte(c.text), DecodeOptions{})
		var re *RecordError
		if !errors.As(err, &re) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, want %q in it", c.name, err, c.want)
		}
	}
}

func TestDecodeManyProblems(t *testing.T) {
	_, err := Decode("f", []byte("instance-id: /\nreservation-id: \"\\t\"\nmetadata-options: {http-tokens: x}\n"), DecodeOptions{})
	var re *RecordError
	if !errors.As(err, &re) || len(re.Lines) != 4 {
		t.Errorf("want four lines, got %v", err)
	}
}

// TestDecodeBomb must not take long over aliases of aliases.
func TestDecodeBomb(t *testing.T) {
	text := "instance-id: i-1\na: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'z'; c++ {
		p := string(c - 1)
		text += string(c) + ": &" + string(c) + " [" + strings.TrimSuffix(strings.Repeat("*"+p+",", 9), ",") + "]\n"
	}
	if _, err := Decode("f", []byte(text), DecodeOptions{}); err == nil {
		t.Error("decoded")
	}
}

func FuzzDecode(f *testing.F) {
	b, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("instance-id: i-1\ncaller: {listener: tap0}\n"))
	f.Add([]byte("launch: {format: ec2, credentials: {sts: {duration: 1h}}}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := Decode("f", b, DecodeOptions{})
		if err != nil {
			return
		}
		if p := in.Complete(); p != nil {
			t.Errorf("completed twice: %v", p)
		}
		if _, err := NewSet(in); err != nil {
			t.Errorf("a set of one: %v", err)
		}
	})
}
