# docker build --file launch/docker/cuda.Dockerfile --tag semflow-cuda .
# The wheels bring CUDA; the machine brings the driver and NVIDIA's container toolkit.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 semflow
WORKDIR /home/semflow/semflow_jax

# Packages first: they change less often than the code.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY semflow_jax/version.py semflow_jax/version.py
RUN pip install --no-cache-dir --editable ".[cuda]"

COPY main.py ./
COPY configs configs
COPY launch launch
COPY semflow_jax semflow_jax

ENV PYTHONUNBUFFERED=1 PYTHONPATH=/home/semflow/semflow_jax
USER 1000
ENTRYPOINT ["python", "main.py"]
