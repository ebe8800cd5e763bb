package rootfs

import (
	"fmt"
	"io"
	"strings"
)

// Rules are the rules by which names stay out of an image, in the order in
// which they are tried: whole paths, whole names, patterns.
func Rules() []Rule {
	var rules []Rule
	add := func(class Class, keep Keep, why string, patterns ...string) {
		for _, p := range patterns {
			p, except, _ := strings.Cut(p, " except ")
			rules = append(rules, Rule{Pattern: p, Except: except, Class: class, Keep: keep, Why: why})
		}
	}
	always := func(class Class, keep Keep, why string, patterns ...string) {
		n := len(rules)
		add(class, keep, why, patterns...)
		for i := n; i < len(rules); i++ {
			rules[i].Always = true
		}
	}
	always(Fixed, KeepDirectory, "the kernel fills it; a few classic device nodes stand in", "/dev")
	always(Fixed, KeepDirectory, "the kernel fills it", "/proc", "/sys")
	always(Fixed, KeepDirectory, "the state of this boot", "/run", "/var/run", "/var/lock")
	always(Fixed, KeepDirectory, "where other disks are mounted", "/mnt", "/media")
	always(Fixed, KeepDirectory, "temporary files", "/tmp", "/var/tmp")
	always(Own, KeepDirectory, "Instar's own state and cache", "/var/lib/instar", "/var/cache/instar", "**/.cache/instar", "**/.local/state/instar")
	always(Own, KeepNothing, "a key of Instar's", "/etc/instar/**/*.key", "/etc/instar/**/.*.key.*", "/etc/instar/**/*.age", "/etc/instar/**/*identity*",
		"**/.config/instar/**/*.key", "**/.config/instar/**/.*.key.*", "**/.config/instar/**/*.age", "**/.config/instar/**/*identity*")
	always(Own, KeepNothing, "a snapshot an interrupted capture left", "/"+snapshotPrefix+"*")

	secretRules(add)
	historyRules(add)
	machineRules(add)
	for i := range rules {
		// These are links, and lead to what stays out.
		if strings.HasPrefix(rules[i].Pattern, "/var/lib/cloud/") {
			rules[i].Links = true
		}
	}
	return rules
}

func secretRules(add func(Class, Keep, string, ...string)) {
	add(Secret, KeepNothing, "SSH private key", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "id_ecdsa_sk", "id_ed25519_sk", "id_xmss",
		"*id_rsa", "*id_dsa", "*id_ecdsa", "*id_ed25519", "**/.ssh/id_* except *.pub", "*.ppk")
	add(Secret, KeepNothing, "who may log in", "**/.ssh/authorized_keys*")
	add(Secret, KeepNothing, "key store", "*.jks", "*.keystore", "*.p12", "*.pfx", "*.kdbx", "*.keytab", "*.priv")
	add(Secret, KeepDirectory, "private keys of TLS certificates (Debian's self-signed one comes back with `make-ssl-cert generate-default-snakeoil --force-overwrite`)", "/etc/ssl/private")
	add(Secret, KeepDirectory, "private keys of TLS certificates", "/etc/pki/tls/private", "/etc/puppetlabs/puppet/ssl/private_keys")
	add(Secret, KeepDirectory, "private keys of GnuPG", "**/.gnupg/private-keys-v1.d", "**/.gnupg/openpgp-revocs.d")
	add(Secret, KeepNothing, "private keys of GnuPG", "**/.gnupg/secring.gpg", "**/.gnupg/random_seed", "**/.gnupg/S.*", "secring.gpg")
	add(Secret, KeepDirectory, "keys of a login session", "**/.local/share/keyrings", "**/.local/share/kwalletd")
	add(Secret, KeepNothing, "cloud credentials", "**/.aws/credentials", "/etc/boto.cfg", ".boto", ".s3cfg", ".passwd-s3fs", "/etc/passwd-s3fs",
		"**/.config/rclone/rclone.conf", ".rclone.conf", "**/.mc/config.json", "**/.mcli/config.json", ".awssecret", ".databrickscfg",
		"**/.euca/*.ini", ".eucarc", "**/.config/doctl/config.yaml", "**/.config/hcloud/cli.toml", "**/.config/linode-cli", "**/.config/scw/config.yaml",
		"**/.config/openstack/clouds.yaml", "**/.config/openstack/secure.yaml", "/etc/openstack/clouds.yaml", "/etc/openstack/secure.yaml", "/etc/ceph/*.keyring")
	add(Secret, KeepDirectory, "cloud credentials", "**/.aws/sso/cache", "**/.aws/cli/cache", "**/.config/gcloud", "**/.azure", "**/.oci", "**/.bluemix", "**/.aliyun")
	add(Secret, KeepNothing, "credentials", ".netrc", "_netrc", ".git-credentials", "**/.config/git/credentials", "**/.docker/config.json", ".dockercfg",
		"**/.config/containers/auth.json", "**/.kube/config", "/etc/kubernetes/*.conf", "/etc/rancher/*/k3s.yaml", "/etc/rancher/*/rke2.yaml", "/var/lib/rancher/*/server/token",
		".pgpass", ".my.cnf", ".mylogin.cnf", ".pypirc", "**/.cargo/credentials", "**/.cargo/credentials.toml", "**/.gem/credentials",
		"**/.terraform.d/credentials.tfrc.json", ".terraformrc", ".vault-token", "**/.config/gh/hosts.yml", "**/.config/hub", "**/.config/glab-cli/config.yml",
		"**/.m2/settings.xml", "**/.m2/settings-security.xml", "**/.composer/auth.json", "**/.config/composer/auth.json", ".smbcredentials", ".cifscredentials", ".fetchmailrc", ".msmtprc",
		"**/.config/op/config", "**/.config/sops/age/keys.txt", "**/.local/share/fish/secrets", ".authinfo", ".mailrc.secret")
	add(Secret, KeepDirectory, "credentials", "**/.subversion/auth", "/etc/apt/auth.conf.d", "**/.config/op", "**/.config/1Password", "**/.password-store", "**/.local/share/python_keyring")
	add(Secret, KeepNothing, "credentials of a service", "/etc/apt/auth.conf", "/etc/krb5.keytab", "/etc/ipsec.secrets", "/etc/ppp/chap-secrets", "/etc/ppp/pap-secrets",
		"/etc/wpa_supplicant/*.conf", "/etc/wireguard/*.conf", "/etc/wireguard/*key*", "/etc/postfix/sasl_passwd*", "/etc/exim4/passwd.client", "/etc/munge/munge.key",
		"/etc/corosync/authkey", "/etc/pacemaker/authkey", "/etc/freeradius/**/clients.conf", "/etc/rndc.key", "/etc/bind/rndc.key", "/etc/openvpn/**/*.key")
	add(Secret, KeepDirectory, "credentials of a service", "/etc/NetworkManager/system-connections", "/var/lib/iwd", "/var/lib/bluetooth", "/var/lib/sss/secrets", "/etc/credstore", "/etc/credstore.encrypted")
	add(Secret, KeepDirectory, "memory of crashed programs", "/var/lib/systemd/coredump", "/var/crash", "/var/lib/apport/coredump")
}

func historyRules(add func(Class, Keep, string, ...string)) {
	add(Secret, KeepNothing, "history of what was typed", ".bash_history", ".zsh_history", ".zhistory", ".histfile", ".sh_history", ".ash_history", ".ksh_history",
		".history", ".tcsh_history", "fish_history", ".python_history", ".node_repl_history", ".irb_history", ".irb-history", ".pry_history", ".php_history", ".lua_history",
		".mysql_history", ".mariadb_history", ".psql_history", ".sqlite_history", ".rediscli_history", ".mongo_history", "**/.mongodb/mongosh/*_repl_history", ".dbshell",
		".influx_history", ".gdb_history", ".Rhistory", ".octave_hist", ".octave_history", ".scapy_history", ".units_history", ".lftp_history", "**/.ipython/**/history.sqlite",
		".lesshst", ".viminfo", "**/.local/state/nvim/shada/main.shada", "**/.local/share/nvim/shada/main.shada", ".wget-hsts", ".xonsh_history", "**/.local/state/bash/history",
		"**/.local/state/python_history", "**/.config/nushell/history.txt", "**/.local/share/powershell/PSReadLine/ConsoleHost_history.txt", ".nano_history", "**/.local/share/nano/search_history")
	add(Leftover, KeepNothing, "a swap, lock or backup file of an editor", ".*.swp", ".*.swo", ".*.swn", ".*.swx", "*.swp", "*.swo", "#*#", ".#*", "*~")
	add(Swap, KeepNothing, "swap space holds memory", "/swapfile", "/swap.img", "/swap", "/swap/swapfile", "/var/swap", "/hiberfil.sys", "/.swapfile")
}

func machineRules(add func(Class, Keep, string, ...string)) {
	add(Machine, KeepEmpty, "each machine has its own", "/etc/machine-id")
	add(Machine, KeepNothing, "each machine has its own", "/var/lib/dbus/machine-id", "/etc/hostid", "/etc/nvme/hostid", "/etc/nvme/hostnqn", "/etc/iscsi/initiatorname.iscsi",
		"/etc/salt/minion_id", "/var/lib/teleport/host_uuid", "/var/lib/dhcpcd/duid", "/var/lib/dhcpcd/secret", "/var/db/dhcpcd/duid", "/etc/dhcpcd.duid", "/etc/dhcpcd.secret")
	add(Machine, KeepNothing, "SSH key of this host", "ssh_host_*_key", "ssh_host_*_key.pub", "ssh_host_key", "ssh_host_key.pub", "/etc/dropbear/dropbear_*_host_key", "/etc/dropbear/*_host_key")
	add(Machine, KeepNothing, "seed of random numbers, or a key made from one", "/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed", "/var/lib/random-seed",
		"/var/lib/misc/random-seed", "/var/lib/seedrng/seed.*", "/etc/random-seed", "/var/lib/systemd/credential.secret", "/var/lib/NetworkManager/secret_key", "/boot/loader/random-seed",
		"/boot/efi/loader/random-seed", "/efi/loader/random-seed")
	add(Machine, KeepNothing, "names network cards and drives by this machine's hardware", "/etc/udev/rules.d/*persistent-net.rules", "/etc/udev/rules.d/*persistent-cd.rules",
		"/etc/udev/rules.d/*persistent-net-generator.rules")
	add(Machine, KeepNothing, "written by cloud-init for this instance", "/var/lib/cloud/instance", "/etc/netplan/50-cloud-init.yaml", "/etc/network/interfaces.d/50-cloud-init",
		"/etc/network/interfaces.d/50-cloud-init.cfg", "/etc/systemd/network/10-cloud-init-*.network", "/etc/NetworkManager/system-connections/cloud-init-*.nmconnection",
		"/var/log/cloud-init.log", "/var/log/cloud-init-output.log")
	add(Machine, KeepDirectory, "written by cloud-init for this instance", "/var/lib/cloud/instances", "/var/lib/cloud/data", "/var/lib/cloud/seed", "/var/lib/cloud/sem")
	add(Machine, KeepNothing, "a lease of this machine's address", "/var/lib/dhcp/*.lease*", "/var/lib/dhcp3/*.lease*", "/var/lib/dhclient/*.lease*", "/var/lib/dhcpcd/*.lease*", "/var/lib/dhcpcd5/*.lease*",
		"/var/lib/NetworkManager/*.lease", "/var/lib/NetworkManager/timestamps", "/var/lib/NetworkManager/seen-bssids", "/var/db/dhcpcd/*.lease*")
	add(Machine, KeepDirectory, "identity of this machine", "/var/lib/tailscale", "/var/lib/zerotier-one", "/var/lib/waagent", "/var/lib/amazon/ssm", "/var/lib/google/guest_agent",
		"/var/lib/systemd/network", "/var/lib/fwupd/pki", "/var/lib/puppet/ssl", "/var/lib/ubuntu-advantage/private")
}

// WriteRules writes the tables of all rules in Markdown.
func WriteRules(w io.Writer) error {
	var b strings.Builder
	b.WriteString("# What stays out of an image\n\n" +
		"Generated from the tables in `ruletable.go` and `content.go`. A pattern with a slash is a path in the volume, one without a name\n" +
		"anywhere; `*` stops at a slash, `**` does not. Rules marked \"always\" hold with `--no-filter`, too; `--include` wins over all of them.\n\n" +
		"## By name\n\n| pattern | class | stays | always | why |\n|---|---|---|---|---|\n")
	for _, r := range Rules() {
		p, always := "`"+r.Pattern+"`", ""
		if r.Except != "" {
			p += " except `" + r.Except + "`"
		}
		if r.Always {
			always = "yes"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", p, r.Class, r.Keep, always, r.Why)
	}
	b.WriteString("\n## By content\n\n| finding | class | recognised by |\n|---|---|---|\n")
	for _, f := range findings() {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", f.why, f.class, f.text)
	}
	b.WriteString("\n" + contentScope + "\n")
	_, err := io.WriteString(w, b.String())
	return err
}
