// A stand-in for an image's system: it shows what the initrd left, runs the
// user data as the unit would, and powers off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

func main() {
	for _, name := range []string{
		"/etc/hostname", "/etc/machine-id", "/etc/fstab", "/etc/ssh/ssh_host_ed25519_key.pub",
		"/home/alice/.ssh/authorized_keys", "/run/instar/instance.json", "/proc/mounts", "/proc/net/route",
		"/proc/cmdline", "/proc/modules", "/proc/sys/kernel/printk_devkmsg",
	} {
		data, err := os.ReadFile(name)
		if err != nil {
			data = []byte(err.Error())
		}
		for line := range strings.Lines(string(data)) {
			fmt.Printf("GUEST %s: %s\n", name, strings.TrimSpace(line))
		}
	}
	if _, err := os.Stat("/init"); err == nil {
		fmt.Println("GUEST the initramfs is still here")
	}
	if cmdline, err := os.ReadFile("/proc/cmdline"); err == nil && strings.Contains(string(cmdline), "guest.lazy") {
		lazy(strings.Fields(string(cmdline)))
	}
	if _, err := os.Stat("/run/instar/user-data"); err == nil {
		out, err := exec.Command("/run/instar/instar-init", "user-data").CombinedOutput()
		fmt.Printf("GUEST user data: %s (%v)\n", out, err)
	}
	fmt.Println("GUEST done")
	syscall.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}
