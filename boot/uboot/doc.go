// Package uboot drives U-Boot by its environment: the variables that fw_printenv
// shows and fw_setenv changes, in a file, on a block device, in raw flash or in a UBI
// volume, in one copy or two.
//
//	env, err := uboot.Open(nil) // as /etc/fw_env.config says
//	d, err := uboot.NewDriver(env, &uboot.DriverConfig{Names: []string{"A", "B"}})
//	loader, err := driver.New(d, current, pending) // two records of boot/bootrecord
//	dev, err := ota.Open(ctx, loader, slots, nil)
//
// # What U-Boot can do by itself
//
// It goes back after a panic if the kernel has panic=N on its command line, and if a
// kernel cannot be loaded and the script resets then. After a hang before any user
// program runs it goes back only if U-Boot itself has started a hardware watchdog
// (CONFIG_WATCHDOG_AUTOSTART).
//
// # What the boot script must do
//
// With the scheme [RAUC]: go through BOOT_ORDER, take the first slot whose
// BOOT_<name>_LEFT is more than 0, in hexadecimal digits, count that down, save the
// environment, and only then start the slot, with rauc.slot=<name> on the command
// line of the kernel. With [Bootcount]: start the slot that the variable names, with
// ota.slot=<name>; altbootcmd sets it to ota_revert, upgrade_available and bootcount
// to 0, saves the environment and starts that slot. bootlimit is set with each trial:
// 1 means one boot. If altbootcmd is missing U-Boot stops at its prompt. The counter
// must be in the environment (CONFIG_BOOTCOUNT_ENV), for [Mender] too: another one
// counts the boots of committed slots as well, and nobody resets it.
//
// # What keeps the environment
//
// With two copies a change is atomic. The copy that is newer by its flags counts, as
// in U-Boot (env/common.c, env_check_redund). A write needs a valid copy to begin
// with: without one U-Boot runs on its compiled-in default, and writing would lose
// every variable of the board. An environment of one copy is written only in a plain
// file, which is replaced, or with EnvOptions.AllowSingle. In the boot partitions of
// an eMMC it can be written once the kernel allows that: 0 in force_ro in sysfs.
package uboot
