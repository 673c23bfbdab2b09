#!/usr/bin/env bash
# Mender client, standalone: mender.sh prepare|install none|zstd (gzip, which it knows,
# instead of zstd) in DIR, of IMAGE, into SLOT while OTHER runs. It finds out what runs
# by what is mounted at /, so it works in a chroot of OTHER, in a mount namespace of its
# own; OTHER must hold a file system for that. Prints what it is; exit code 77 if it is
# not there.
set -euo pipefail
for t in mender mender-artifact openssl fw_setenv unshare; do command -v $t >/dev/null || { echo "$t is not installed"; exit 77; }; done
[ -b "$SLOT" ] && [ -b "$OTHER" ] && blkid "$OTHER" >/dev/null || { echo "it needs block devices, and a file system in the running one"; exit 77; }
cd "$DIR"
kind=$2
[ "$kind" = zstd ] && kind=gzip
case $1 in
prepare)
	openssl genrsa -traditional -out key.pem 2048 2>/dev/null
	openssl rsa -in key.pem -pubout -out pub.pem 2>/dev/null
	mkdir -p root data
	cp -a /etc etc
	mkdir -p etc/mender
	echo artifact_name=rel1 >etc/mender/artifact_info
	echo device_type=bench >device_type
	cat >mender.conf <<-X
	{"RootfsPartA":"$OTHER","RootfsPartB":"$SLOT","ArtifactVerifyKey":"$DIR/pub.pem","DeviceTypeFile":"$DIR/device_type","ServerURL":"http://127.0.0.1:1"}
	X
	truncate -s 16384 uboot.env
	echo "$DIR/uboot.env 0x0 0x4000" >etc/fw_env.config
	n=$(echo "$OTHER" | grep -oE '[0-9]+$')
	printf 'mender_boot_part=%s\nmender_boot_part_hex=%x\nupgrade_available=0\nbootcount=0\n' "$n" "$n" >etc/u-boot-initial-env
	mender-artifact write rootfs-image -f "$IMAGE" -n rel2 -t bench --compression $kind -k key.pem -o fw.mender >mk.log 2>&1 || { cat mk.log; exit 1; }
	echo "Mender $(mender --version 2>&1 | grep -oE '[0-9]+\.[0-9.]+' | head -1), $kind"
	;;
install)
	rm -rf data
	mkdir data
	export DIR OTHER
	unshare -m --propagation private bash -euc '
		mount -o ro "$OTHER" root
		for d in usr var run tmp proc sys dev; do mount --rbind /$d root/$d; done
		mount --bind etc root/etc
		[ -d /lib64 ] && [ -d root/lib64 ] && mount --rbind /lib64 root/lib64
		chroot root fw_setenv -c /etc/fw_env.config -f /etc/u-boot-initial-env -s /etc/u-boot-initial-env
		exec chroot root mender --config "$DIR/mender.conf" --data "$DIR/data" --log-level info install "$DIR/fw.mender"' >install.log 2>&1 || { rc=$?; tail -20 install.log; exit $rc; }
	;;
esac
