package inroot

import (
	"regexp"
	"strings"
	"testing"
)

// policy has the forms that occur in the targeted policy.
const policy = `# comment
/.*	system_u:object_r:default_t:s0
/etc/.*	system_u:object_r:etc_t:s0
/etc/ssh/ssh_host.*_key	--	system_u:object_r:sshd_key_t:s0
/etc/ssh/ssh_host.*_key\.pub	--	system_u:object_r:sshd_key_t:s0
/etc/hostname	--	system_u:object_r:hostname_etc_t:s0
/etc/fstab\.d	-d	system_u:object_r:etc_t:s0
/home/[^/]+/.+	unconfined_u:object_r:user_home_t:s0
/home/[^/]+/\.ssh(/.*)?	unconfined_u:object_r:ssh_home_t:s0
/root(/.*)?	system_u:object_r:admin_home_t:s0
/root/\.ssh(/.*)?	system_u:object_r:ssh_home_t:s0
/tmp/.*	<<none>>
/odd(?!x)	system_u:object_r:odd_t:s0
/one|/two.*	system_u:object_r:either_t:s0
/label	no-label
/etc/many words in a line
relative	system_u:object_r:etc_t:s0
`

func TestFileContexts(t *testing.T) {
	all := parseContexts(policy)
	for _, c := range []struct {
		name string
		dir  bool
		want string
	}{
		{"/etc/ssh/ssh_host_ed25519_key", false, "sshd_key_t"},
		{"/etc/ssh/ssh_host_ed25519_key.pub", false, "sshd_key_t"},
		{"/etc/ssh/ssh_host_ed25519_key", true, "etc_t"}, // "--" is files only
		{"/etc/hostname", false, "hostname_etc_t"},
		{"/etc/fstab", false, "etc_t"},
		{"/home/alice/.ssh", true, "ssh_home_t"},
		{"/home/alice/.ssh/authorized_keys", false, "ssh_home_t"},
		{"/home/alice/xssh", false, "user_home_t"}, // the dot is a dot
		{"/root", true, "admin_home_t"},
		{"/root/.ssh/authorized_keys", false, "ssh_home_t"},
		{"/tmp/x", false, ""},
		{"/two/x", false, "either_t"},
		{"/one", false, "either_t"},
		{"/label", false, "default_t"},
		{"/odd", false, "default_t"},
		{"/srv", true, "default_t"},
	} {
		got := all.find(c.name, c.dir)
		if c.want == "" && got != "" || c.want != "" && !strings.HasSuffix(got, ":"+c.want+":s0") {
			t.Errorf("label of %s (directory %v) is %q, want %s", c.name, c.dir, got, c.want)
		}
	}
}

// FuzzFileContexts: the prefix that spares compiling a pattern never hides a
// path that the pattern matches.
func FuzzFileContexts(f *testing.F) {
	f.Add("/home/[^/]+/\\.ssh(/.*)?", "/home/a/.ssh/x")
	f.Add("/a?b", "/b")
	f.Add("/a{0}", "/")
	f.Add("/one|/two.*", "/two")
	f.Add("/a\\|b", "/a|b")
	f.Add("/(a|b)c", "/bc")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		if strings.ContainsAny(pattern, " \t\n\v\f\r\u0085\u00a0") || strings.ContainsAny(name, "\n") {
			return
		}
		const l = "system_u:object_r:etc_t:s0"
		all := parseContexts(pattern + " " + l + "\n")
		if len(all) == 0 {
			return
		}
		re, err := regexp.Compile("^(?:" + pattern + ")$")
		if err != nil {
			return
		}
		if want := re.MatchString(name); want != (all.find(name, false) == l) {
			t.Errorf("pattern %q matches %q: %v; it was read as %+v", pattern, name, want, all[0])
		}
	})
}
