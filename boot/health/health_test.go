package health_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/health"
	ubootenv "github.com/slotota/ota/boot/uboot"
	"github.com/slotota/ota/flash/memflash"
)

// good is a machine on which nothing is to be found.
func good() map[string]string {
	return map[string]string{
		"proc/cmdline":                            "console=ttyS0 panic=10 oops=panic rauc.slot=A root=PARTUUID=1234-02\n",
		"proc/sys/kernel/panic":                   "10\n",
		"proc/sys/kernel/panic_on_oops":           "1\n",
		"sys/class/watchdog/watchdog0/identity":   "Orion\n",
		"sys/class/watchdog/watchdog0/state":      "active\n",
		"sys/class/watchdog/watchdog0/timeout":    "30\n",
		"sys/class/watchdog/watchdog0/bootstatus": "0\n",
		"sys/class/watchdog/watchdog0/nowayout":   "0\n",
	}
}

func write(t *testing.T, files map[string]string) string {
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	}
	return root
}

func config(t *testing.T, text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.String()
}

// record returns a boot record that knows which slot runs by running.
func record(t *testing.T, running func(context.Context) (ota.SlotID, error)) ota.Bootloader {
	r, err := bootrecord.New(memflash.NewChip(slices.Repeat([]memflash.Config{{Size: bootrecord.MaxSize}}, 3)...).Flashes(), &bootrecord.Options{Running: running})
	require.NoError(t, err)
	return r
}

// uboot returns the boot loader of a U-Boot with so many copies of its environment.
func uboot(t *testing.T, copies int) ota.Bootloader {
	running := func(context.Context) (ota.SlotID, error) { return 0, nil }
	e, err := ubootenv.NewEnv(memflash.NewChip(slices.Repeat([]memflash.Config{{Size: 4096}}, copies)...).Flashes(), &ubootenv.EnvOptions{Size: 4096})
	require.NoError(t, err)
	d, err := ubootenv.NewDriver(e, &ubootenv.DriverConfig{Names: []string{"A", "B"}, Running: running})
	require.NoError(t, err)
	b, err := driver.New(d, record(t, nil), record(t, nil))
	require.NoError(t, err)
	return b
}

func TestCheck(t *testing.T) {
	const wd = "sys/class/watchdog/watchdog0/"
	without := func(m map[string]string, prefix string) {
		for name := range m {
			if len(name) >= len(prefix) && name[:len(prefix)] == prefix {
				delete(m, name)
			}
		}
	}
	critical, warning, note := ota.Critical, ota.Warning, ota.Note
	type found = map[string]ota.Severity
	for name, tc := range map[string]struct {
		change func(m map[string]string)
		o      health.Options
		want   found
	}{
		"good":             {func(m map[string]string) {}, health.Options{}, found{}},
		"panic halts":      {func(m map[string]string) { m["proc/sys/kernel/panic"] = "0\n" }, health.Options{}, found{health.PanicHalts: critical}},
		"restarts at once": {func(m map[string]string) { m["proc/sys/kernel/panic"] = "-1\n" }, health.Options{}, found{}},
		"by sysctl only":   {func(m map[string]string) { m["proc/cmdline"] = "ota.slot=a" }, health.Options{}, found{health.PanicEarly: critical}},
		"panic=0, sysctl":  {func(m map[string]string) { m["proc/cmdline"] = "panic=5 panic=0 ota.slot=a" }, health.Options{}, found{health.PanicEarly: critical}},
		"for init":         {func(m map[string]string) { m["proc/cmdline"] = "ota.slot=a -- panic=5" }, health.Options{}, found{health.PanicEarly: critical}},
		"built in": {func(m map[string]string) {
			m["proc/cmdline"] = "ota.slot=a"
			m["proc/config.gz"] = config(t, "# x\nCONFIG_PANIC_TIMEOUT=5\n")
		}, health.Options{}, found{}},
		"built in 0": {func(m map[string]string) {
			m["proc/cmdline"] = "ota.slot=a"
			m["proc/config.gz"] = config(t, "CONFIG_PANIC_TIMEOUT=0\n")
		}, health.Options{}, found{health.PanicEarly: critical}},
		"broken config":   {func(m map[string]string) { m["proc/cmdline"] = "ota.slot=a"; m["proc/config.gz"] = "x" }, health.Options{}, found{health.PanicEarly: critical}},
		"oops":            {func(m map[string]string) { m["proc/sys/kernel/panic_on_oops"] = "0\n" }, health.Options{}, found{health.OopsContinues: note}},
		"no proc":         {func(m map[string]string) { without(m, "proc/") }, health.Options{}, found{health.Unreadable: warning}},
		"no number":       {func(m map[string]string) { m["proc/sys/kernel/panic"] = "ten" }, health.Options{}, found{health.Unreadable: warning}},
		"no watchdog":     {func(m map[string]string) { without(m, "sys/") }, health.Options{}, found{health.WatchdogMissing: critical}},
		"no sysfs":        {func(m map[string]string) { without(m, "sys/"); m["dev/watchdog"] = "" }, health.Options{}, found{health.WatchdogUnknown: warning}},
		"no state":        {func(m map[string]string) { delete(m, wd+"state") }, health.Options{}, found{health.WatchdogUnknown: warning}},
		"idle":            {func(m map[string]string) { m[wd+"state"] = "inactive\n" }, health.Options{}, found{health.WatchdogIdle: critical}},
		"idle, for trial": {func(m map[string]string) { m[wd+"state"] = "inactive\n" }, health.Options{WatchdogInTrial: true}, found{health.WatchdogIdle: warning}},
		"second runs": {func(m map[string]string) {
			m[wd+"state"] = "inactive\n"
			m["sys/class/watchdog/watchdog1/state"] = "active\n"
		}, health.Options{}, found{}},
		"softdog":    {func(m map[string]string) { m[wd+"identity"] = "Software Watchdog\n" }, health.Options{}, found{health.WatchdogSoftware: warning}},
		"nowayout":   {func(m map[string]string) { m[wd+"nowayout"] = "1\n" }, health.Options{WatchdogInTrial: true}, found{health.WatchdogNoWayOut: warning}},
		"no matter":  {func(m map[string]string) { m[wd+"nowayout"] = "1\n" }, health.Options{}, found{}},
		"slow":       {func(m map[string]string) { m[wd+"timeout"] = "3600\n" }, health.Options{}, found{health.WatchdogSlow: warning}},
		"has bitten": {func(m map[string]string) { m[wd+"bootstatus"] = "32\n" }, health.Options{}, found{health.WatchdogBit: note}},
		"one copy":   {func(m map[string]string) {}, health.Options{Capabilities: driver.Capabilities{Copies: 1}}, found{health.EnvironmentSingle: warning}},
		"two copies": {func(m map[string]string) {}, health.Options{Bootloader: uboot(t, 2)}, found{health.LoaderHang: warning}},
		"one copy, as it says itself": {func(m map[string]string) {}, health.Options{Bootloader: uboot(t, 1), Capabilities: driver.Capabilities{Copies: 2}},
			found{health.EnvironmentSingle: warning, health.LoaderHang: warning}},
		"no root": {func(m map[string]string) { m["proc/cmdline"] = "panic=1" }, health.Options{}, found{health.RootUnknown: critical}},
		"sda":     {func(m map[string]string) { m["proc/cmdline"] = "panic=1 root=/dev/sda2" }, health.Options{}, found{health.RootUnstable: warning}},
		"emmc":    {func(m map[string]string) { m["proc/cmdline"] = "panic=1 root=/dev/mmcblk0p2" }, health.Options{}, found{}},
		"asked": {func(m map[string]string) { m["proc/cmdline"] = "panic=1" }, health.Options{
			Bootloader: record(t, func(context.Context) (ota.SlotID, error) { return 1, nil })}, found{}},
		"asked in vain": {func(m map[string]string) {}, health.Options{
			Bootloader: record(t, func(context.Context) (ota.SlotID, error) { return ota.NoSlot, errors.New("hidden") })}, found{health.RootUnknown: critical}},
		"loader": {func(m map[string]string) {}, health.Options{Capabilities: driver.Capabilities{
			Loader: "X", OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.No}},
			found{health.LoaderHang: warning, health.LoaderUnloadable: critical}},
	} {
		t.Run(name, func(t *testing.T) {
			m := good()
			tc.change(m)
			tc.o.Root = write(t, m)
			got, worst := found{}, ota.Severity("")
			for _, f := range health.Check(t.Context(), &tc.o) {
				got[f.ID] = f.Severity
				require.NotEmpty(t, f.What)
				require.NotContains(t, f.What, tc.o.Root)
				if f.ID != health.WatchdogBit && f.ID != health.LoaderUnloadable {
					require.NotEmpty(t, f.Remedy, f.ID)
				}
				if worst == "" || f.Severity == critical || worst == note {
					worst = f.Severity
				}
			}
			require.Equal(t, tc.want, got)
			require.Equal(t, worst, health.Worst(health.Check(t.Context(), &tc.o)))
		})
	}
}

// It also works where there is nothing at all.
func TestNoRoot(t *testing.T) {
	fs := health.Check(t.Context(), &health.Options{Root: filepath.Join(t.TempDir(), "none")})
	require.Len(t, fs, 3)
	require.Equal(t, ota.Critical, health.Worst(fs))
}
