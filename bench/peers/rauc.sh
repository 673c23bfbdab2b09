#!/usr/bin/env bash
# RAUC, plain bundle, with a D-Bus and a service of its own: rauc.sh prepare|install
# none|zstd in DIR, of IMAGE, into SLOT while OTHER runs. Prints what it is; exit code
# 77 if it is not there.
set -euo pipefail
for t in rauc openssl mksquashfs dbus-daemon dbus-send; do command -v $t >/dev/null || { echo "$t is not installed"; exit 77; }; done
[ -b "$SLOT" ] && [ -b "$OTHER" ] || { echo "it needs block devices"; exit 77; }
cd "$DIR"
case $1 in
prepare)
	openssl req -x509 -newkey rsa:2048 -nodes -days 9 -sha256 -subj /CN=bench -addext basicConstraints=critical,CA:TRUE \
		-addext keyUsage=digitalSignature,keyCertSign -addext extendedKeyUsage=emailProtection,codeSigning \
		-keyout key.pem -out cert.pem 2>/dev/null
	mkdir -p data mnt content
	cat >backend <<-'X'
	#!/bin/sh
	case "$1" in get-primary | get-current) echo A ;; get-state) echo good ;; esac
	X
	chmod +x backend
	cat >system.conf <<-X
	[system]
	compatible=bench
	bootloader=custom
	mountprefix=$DIR/mnt
	data-directory=$DIR/data
	bundle-formats=plain
	[keyring]
	path=$DIR/cert.pem
	[handlers]
	bootloader-custom-backend=$DIR/backend
	[slot.rootfs.0]
	device=$OTHER
	type=raw
	bootname=A
	[slot.rootfs.1]
	device=$SLOT
	type=raw
	bootname=B
	X
	cp "$IMAGE" content/rootfs.img
	printf '[update]\ncompatible=bench\nversion=2\n[bundle]\nformat=plain\n[image.rootfs]\nfilename=rootfs.img\n' >content/manifest.raucm
	pack="-noD -noI -noF -noX"
	[ "$2" = zstd ] && pack="-comp zstd -Xcompression-level 3"
	rm -f fw.raucb
	rauc --cert=cert.pem --key=key.pem --mksquashfs-args="$pack" bundle content fw.raucb >mk.log 2>&1 || { cat mk.log; exit 1; }
	rm -r content
	echo "RAUC $(rauc --version | grep -o '[0-9.]*$'), $2"
	;;
install)
	rm -rf data/* bus
	dbus-daemon --session --nofork --nopidfile --address=unix:path="$DIR/bus" >/dev/null 2>&1 & bus=$!
	for _ in $(seq 100); do [ -S bus ] && break; sleep 0.01; done
	export DBUS_SESSION_BUS_ADDRESS=unix:path="$DIR/bus" DBUS_STARTER_BUS_TYPE=session
	rauc --conf="$DIR/system.conf" --override-boot-slot=A service >service.log 2>&1 & service=$!
	for _ in $(seq 200); do
		dbus-send --session --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.NameHasOwner \
			string:de.pengutronix.rauc 2>/dev/null | grep -q true && break
		sleep 0.01
	done
	rc=0
	rauc install "$DIR/fw.raucb" >install.log 2>&1 || { rc=$?; cat install.log service.log; }
	kill $service $bus
	wait || true
	exit $rc
	;;
esac
