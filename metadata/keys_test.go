package metadata

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeSTS mints keys that are good for an hour, or fails.
type fakeSTS struct {
	calls atomic.Int32
	fail  atomic.Bool
}

func (f *fakeSTS) Mint(_ context.Context, _ *STS, session string) (StaticKeys, error) {
	n := f.calls.Add(1)
	if f.fail.Load() {
		return StaticKeys{}, errors.New("the STS is down")
	}
	return StaticKeys{AccessKeyID: session + "-" + string('0'+rune(n)), SecretAccessKey: "s", Expiration: time.Now().Add(time.Hour)}, nil
}

// TestKeyRing renews minted keys in time, once for a crowd, and lives through
// an STS that is down as long as the old keys are good.
func TestKeyRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		ring := NewKeyRing(sts)
		c := &Credentials{STS: &STS{}}
		get := func() (string, error) {
			k, _, err := ring.Get(context.Background(), "i-1", c, time.Now())
			if err == nil && !k.Expiration.After(time.Now()) {
				t.Error("got keys that have expired")
			}
			return k.AccessKeyID, err
		}
		expect := func(when, want string) {
			t.Helper()
			if got, err := get(); got != want || err != nil {
				t.Errorf("%s: %q, %v, want %q", when, got, err, want)
			}
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { expect("at first", "i-1-1") })
		}
		wg.Wait()
		time.Sleep(44 * time.Minute)
		expect("with 16 minutes left", "i-1-1")
		time.Sleep(2 * time.Minute)
		expect("with 14 minutes left", "i-1-2")
		sts.fail.Store(true)
		time.Sleep(50 * time.Minute)
		expect("with the STS down", "i-1-2")
		before := sts.calls.Load()
		for range 20 {
			expect("with the STS down", "i-1-2")
		}
		if n := sts.calls.Load() - before; n != 0 {
			t.Errorf("%d further calls within two seconds of a failure", n)
		}
		time.Sleep(11 * time.Minute)
		if got, err := get(); err == nil {
			t.Errorf("keys %q although the STS was down until they expired", got)
		}
		sts.fail.Store(false)
		time.Sleep(3 * time.Second)
		if _, err := get(); err != nil {
			t.Errorf("with the STS back: %v", err)
		}
	})
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	ring := NewKeyRing(nil)
	c := &Credentials{File: path}
	now := time.Now()
	write := func(s string) {
		tmp := path + ".tmp"
		if err := os.WriteFile(tmp, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, path); err != nil {
			t.Fatal(err)
		}
	}
	get := func() (string, error) {
		k, _, err := ring.Get(context.Background(), "i-1", c, now)
		return k.AccessKeyID, err
	}
	if _, err := get(); err == nil {
		t.Error("no file: no error")
	}
	end := now.Add(time.Hour).UTC().Format(time.RFC3339)
	write(`{"AccessKeyId":"A","SecretAccessKey":"S","Token":"T","Expiration":"` + end + `"}`)
	if k, err := get(); k != "A" || err != nil {
		t.Errorf("got %q, %v", k, err)
	}
	write("nonsense")
	if k, err := get(); k != "A" || err != nil {
		t.Errorf("a broken file while the old keys are good: %q, %v", k, err)
	}
	write(`{"AccessKeyId":"B","SecretAccessKey":"S"}`)
	for range 2 {
		if k, err := get(); k != "B" || err != nil {
			t.Errorf("without an end: %q, %v", k, err)
		}
		now = now.Add(48 * time.Hour)
	}
	write(`{"AccessKeyId":"C","SecretAccessKey":"S","Expiration":"2020-01-01T00:00:00Z"}`)
	if k, err := get(); !errors.Is(err, ErrExpired) {
		t.Errorf("expired keys: %q, %v", k, err)
	}
}

// TestRoleUnavailable answers 503 for credentials that cannot be had, and
// everything else as ever.
func TestRoleUnavailable(t *testing.T) {
	in := small("i-1", fullAddr)
	in.Role = &Role{Name: "r", Credentials: Credentials{File: "/nonexistent"}}
	h := newHandler(t, Options{}, in)
	if w := ask(h, fullAddr, "GET", "/latest/meta-data/iam/security-credentials/r"); w.Code != 503 {
		t.Errorf("credentials: %d", w.Code)
	}
	if w := ask(h, fullAddr, "GET", "/latest/meta-data/iam/security-credentials/"); w.Code != 200 || w.Body.String() != "r" {
		t.Errorf("listing: %d %q", w.Code, w.Body)
	}
	if w := ask(h, fullAddr, "GET", "/latest/meta-data/iam/security-credentials/other"); w.Code != 404 {
		t.Errorf("another role: %d", w.Code)
	}
}
